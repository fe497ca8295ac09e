import logging

# bitsandbytes warns at import of a kernel for inference that has no autograd; qorpo keeps it out of training.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
