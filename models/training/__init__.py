"""One model trained alone: the plain loop, which the fused engine must agree with, and its parts."""
