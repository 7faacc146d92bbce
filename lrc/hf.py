"""Our folders in transformers' auto classes: `import lrc.hf`, then `AutoModel.from_pretrained(folder)` as ever.

Without this import transformers refuses the folder, because it does not know the `model_type` (`lrc_<base>`).
"""

from lrc.program.auto_classes import register

register()
