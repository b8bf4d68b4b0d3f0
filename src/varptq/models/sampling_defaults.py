"""How an image is drawn where nobody says otherwise: the VAR paper's evaluation (docs/method.md
section 1). One set for Python, the command line and the studio, so that a seed gives one picture.

A file without imports, so that `varptq --help` can print the numbers without torch.
"""

CFG = 1.5
TOP_K = 900
TOP_P = 0.96

# Of one call; more would not be drawn in years.
MAX_IMAGES = 10**9
