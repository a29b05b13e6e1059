"""Experts compressed to one shared core with low-rank wrappers: the layer, its fit, its files.

For each projection of each layer, ``W_e = (I + U_out,e V_out,eᵀ) C (I + U_in,e V_in,eᵀ)``: the core C
[d_out, d_in] is shared over the experts e, the wrappers U, V [width, rank] are their own.
"""
