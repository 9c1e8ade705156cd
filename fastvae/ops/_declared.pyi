"""Ops of the declared likelihoods, written by ``python -m tools.stubs``."""

from torch import Tensor

__all__ = [
    "bernoulli_log_prob",
    "beta_log_prob",
    "continuous_bernoulli_log_prob",
    "discretized_logistic_log_prob",
    "gaussian_log_prob",
    "laplace_log_prob",
    "log_normal_log_prob",
    "logistic_log_prob",
    "negative_binomial_log_prob",
    "poisson_log_prob",
    "softplus_gaussian_log_prob",
    "student_t_log_prob",
    "zero_inflated_negative_binomial_log_prob",
]

def bernoulli_log_prob(
    x: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a bernoulli likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.Bernoulli`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of logits.
        logits: [..., B, *event].
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 0.5)
        >>> outputs = torch.zeros(1, 3, 4, 7)  # logits
        >>> fastvae.ops.bernoulli_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def beta_log_prob(
    x: Tensor,
    log_concentration1: Tensor,
    log_concentration0: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a beta likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.Beta`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of log_concentration1.
        log_concentration1: [..., B, *event].
        log_concentration0: broadcastable to log_concentration1: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 0.5)
        >>> outputs = torch.zeros(2, 3, 4, 7)  # log_concentration1, log_concentration0
        >>> fastvae.ops.beta_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def continuous_bernoulli_log_prob(
    x: Tensor,
    logits: Tensor,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a continuous bernoulli likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.ContinuousBernoulli`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of logits.
        logits: [..., B, *event].
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 0.5)
        >>> outputs = torch.zeros(1, 3, 4, 7)  # logits
        >>> fastvae.ops.continuous_bernoulli_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def discretized_logistic_log_prob(
    x: Tensor,
    mean: Tensor,
    log_scale: Tensor | float,
    log_bin_width: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a discretized logistic likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.DiscretizedLogistic`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of mean.
        mean: [..., B, *event].
        log_scale: broadcastable to mean: its shape, one row [*event], or one number.
        log_bin_width: broadcastable to mean: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 0.5)
        >>> outputs = torch.zeros(3, 3, 4, 7)  # mean, log_scale, log_bin_width
        >>> fastvae.ops.discretized_logistic_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def gaussian_log_prob(
    x: Tensor,
    mean: Tensor,
    logvar: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a gaussian likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.Gaussian`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of mean.
        mean: [..., B, *event].
        logvar: broadcastable to mean: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(2, 3, 4, 7)  # mean, logvar
        >>> fastvae.ops.gaussian_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def laplace_log_prob(
    x: Tensor,
    location: Tensor,
    log_scale: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a laplace likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.Laplace`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of location.
        location: [..., B, *event].
        log_scale: broadcastable to location: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(2, 3, 4, 7)  # location, log_scale
        >>> fastvae.ops.laplace_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def log_normal_log_prob(
    x: Tensor,
    location: Tensor,
    log_scale: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a log normal likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.LogNormal`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of location.
        location: [..., B, *event].
        log_scale: broadcastable to location: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(2, 3, 4, 7)  # location, log_scale
        >>> fastvae.ops.log_normal_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def logistic_log_prob(
    x: Tensor,
    location: Tensor,
    log_scale: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a logistic likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.Logistic`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of location.
        location: [..., B, *event].
        log_scale: broadcastable to location: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(2, 3, 4, 7)  # location, log_scale
        >>> fastvae.ops.logistic_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def negative_binomial_log_prob(
    x: Tensor,
    log_mean: Tensor,
    log_inverse_dispersion: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a negative binomial likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.NegativeBinomial`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of log_mean.
        log_mean: [..., B, *event].
        log_inverse_dispersion: broadcastable to log_mean: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(2, 3, 4, 7)  # log_mean, log_inverse_dispersion
        >>> fastvae.ops.negative_binomial_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def poisson_log_prob(
    x: Tensor,
    log_rate: Tensor,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a poisson likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.Poisson`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of log_rate.
        log_rate: [..., B, *event].
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(1, 3, 4, 7)  # log_rate
        >>> fastvae.ops.poisson_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def softplus_gaussian_log_prob(
    x: Tensor,
    mean: Tensor,
    raw: Tensor | float,
    log_floor: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a softplus gaussian likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.SoftplusGaussian`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of mean.
        mean: [..., B, *event].
        raw: broadcastable to mean: its shape, one row [*event], or one number.
        log_floor: broadcastable to mean: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(3, 3, 4, 7)  # mean, raw, log_floor
        >>> fastvae.ops.softplus_gaussian_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def student_t_log_prob(
    x: Tensor,
    location: Tensor,
    log_scale: Tensor | float,
    log_df: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a student t likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.StudentT`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of location.
        location: [..., B, *event].
        log_scale: broadcastable to location: its shape, one row [*event], or one number.
        log_df: broadcastable to location: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(3, 3, 4, 7)  # location, log_scale, log_df
        >>> fastvae.ops.student_t_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """

def zero_inflated_negative_binomial_log_prob(
    x: Tensor,
    log_mean: Tensor,
    log_inverse_dispersion: Tensor | float,
    dropout_logit: Tensor | float,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute log p(x|z) of a zero inflated negative binomial likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.ZeroInflatedNegativeBinomial`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of log_mean.
        log_mean: [..., B, *event].
        log_inverse_dispersion: broadcastable to log_mean: its shape, one row [*event], or one number.
        dropout_logit: broadcastable to log_mean: its shape, one row [*event], or one number.
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), 1.0)
        >>> outputs = torch.zeros(3, 3, 4, 7)  # log_mean, log_inverse_dispersion, dropout_logit
        >>> fastvae.ops.zero_inflated_negative_binomial_log_prob(x, *outputs).shape
        torch.Size([3, 4])
    """
