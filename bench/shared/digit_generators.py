"""The generators of digits whose pictures the simulated person judges: the zoo's, after a shorter training.

All are kept in the user's cache folder once made.
"""

from functools import partial

from evojax_merge.zoo import Family
from evojax_merge.zoo.ddpm import MODELS, Training, make_family

TRAINING = Training(steps=(400, 80, 160), rates=(4e-3, 1e-3, 2e-3), batch=32)
FAMILY = Family(
    "digit generators", "digit-generators-v1", MODELS, partial(make_family, plan=TRAINING), sum(TRAINING.steps)
)
