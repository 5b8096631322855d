"""The interval of a share, for whoever states one."""

import math

from scipy.stats import norm


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95% score interval (Wilson 1927) of a `share` of `n` flags, which need not be a whole number."""
    z = norm.ppf(0.975)
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = (float((centre + sign * half) / (1 + z**2 / n)) for sign in (-1, 1))
    return low if share > 0 else 0.0, high if share < 1 else 1.0
