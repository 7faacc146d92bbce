"""Verification: parity of artifacts, quality metrics, and gates.

Nothing is imported here, so that a worker process loads only what its artifact needs: see `lrc.verify.parity`,
`lrc.verify.evaluate`, `lrc.verify.gates`, `lrc.verify.ort`.
"""
