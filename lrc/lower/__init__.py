"""Lowering: eager modules, Hugging Face folders, torch.compile, AOTInductor packages, ONNX. Nothing is imported here."""
