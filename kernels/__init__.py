"""Fused kernels of adrec and their pure-torch twins.

Today this package holds the noise contract (`kernels.philox`). A line belongs here when it touches a pointer or
draws counter-based noise.
"""
