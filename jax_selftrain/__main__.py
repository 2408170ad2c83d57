"""`python -m jax_selftrain` is `jax-selftrain`."""

import sys

from jax_selftrain.cli import main

sys.exit(main())
