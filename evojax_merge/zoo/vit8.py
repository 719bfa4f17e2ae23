"""Eight image classifiers of one base, as those of `vit`. Each is fine-tuned on three neighbouring digits and named by
the first: from 0, 1 and 2 up to 7, 8 and 9. The four that begin at 0, 2, 5 and 7 see all digits together.
"""

from functools import partial

from evojax_merge.zoo import Family
from evojax_merge.zoo.vit import make_family

EXPERTS = {f"from{first}": range(first, first + 3) for first in range(8)}
STEPS, RATES = (25, *[100] * len(EXPERTS)), (1e-3, *[5e-4] * len(EXPERTS))

FAMILY = Family(
    "vit8", "vit8-v1", ("base", *EXPERTS), partial(make_family, steps=STEPS, rates=RATES, experts=EXPERTS), sum(STEPS)
)
