"""All that is to be learnt of a CUDA machine in a quarter of an hour."""
