"""Triton kernels, a file each with its launcher. Imported when the first call needs one."""
