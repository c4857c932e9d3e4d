"""Steps that stay on the GPU: memory that keeps its place (`arena.py`), CUDA graphs over it (`graphs.py`), the step (`step.py`)."""
