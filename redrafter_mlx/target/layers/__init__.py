"""What single model families have for themselves, a file each.

A file says which functions (FUNCTIONS, by mlx-lm's module) and methods (METHODS, by class) it
stands in for, what these take, and what to do instead when rows may be rejected.
"""

from redrafter_mlx.target.layers import (
    afm,
    baichuan,
    lightning,
    llama4,
    longcat,
    mamba,
    positions,
    recurrent_gemma,
    rwkv7,
)

_ALL = (afm, baichuan, lightning, llama4, longcat, mamba, positions, recurrent_gemma, rwkv7)
FUNCTIONS = {name: found for each in _ALL for name, found in each.FUNCTIONS.items()}
METHODS = {name: found for each in _ALL for name, found in each.METHODS.items()}
