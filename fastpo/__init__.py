"""fastpo: preference alignment for video and multi-image language models."""

import logging

__version__ = "0.1.0"

# DeepSpeed, which transformers imports, warns about every machine without a GPU
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
