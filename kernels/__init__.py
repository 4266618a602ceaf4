"""Fused Triton kernels of adrec, each beside a pure-torch twin of the same signature.

A kernel's module holds its public function, its twin (``<name>_twin``) and its entries of `kernels.inventory`; kernels
run on CUDA devices, elsewhere the public function runs its twin. `kernels.philox` is the noise contract. A line belongs
here when it touches a pointer or draws counter-based noise.
"""
