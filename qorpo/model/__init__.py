import logging
import os

# bitsandbytes warns at import of a kernel for inference that has no autograd; qorpo keeps it out of training.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# On the CPU oneDNN keeps up to 1,024 matrix products it was asked for, most of a megabyte each; packed rows differ in
# length, so they would all be new. 128 hold a step's. Read at the first product.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
