"""What separate processes must agree on.

Where torchao is installed, transformers imports it, and it tells of each kernel that this machine cannot use and of its
own deprecations, which nobody here could mend.
"""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
