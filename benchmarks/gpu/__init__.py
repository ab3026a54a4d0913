"""What needs a GPU: the plan of `make gpu`, profiles, tuning; the counted work and resources of its kernels."""
