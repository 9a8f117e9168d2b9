"""Words: what figures call estimators, metrics and numbers, whose own names are made for typing."""

WORDS = {
    # estimators of the gradient
    "total": "total return",
    "total_mean": "total return − others' mean",
    "total_own_mean": "total return − batch mean",
    "total_standardised": "total return, standardised",
    "total_constant": "total return − J",
    "total_optimal": "total return − best constant",
    "total_optimal_parameter": "total return − best per weight",
    "rtg": "reward to go",
    "rtg_constant": "reward to go − J",
    "rtg_optimal": "reward to go − best constant",
    "rtg_time_mean": "reward to go − others' mean at t",
    "rtg_optimal_loo": "reward to go − others' best",
    "rtg_optimal_token": "reward to go − score-weighted",
    "rtg_time": "reward to go − mean at t",
    "rtg_optimal_time": "reward to go − best b(t)",
    "rtg_peters_schaal": "reward to go − best b(t, weight)",
    "rtg_value": "reward to go − V",
    "rtg_optimal_state": "reward to go − best b(t, s)",
    "exact_advantage": "exact Q − V",
    "all_action": "exact Q of all actions",
    "is_total": "weights of the whole episode",
    "is_pdis": "per-decision weights",
    "is_note_literal": "own ratio counted twice",
    "is_first_order": "weights of the steps so far",
    "is_marginal": "marginal weights",
    "is_step": "the step's own weight",
    # weights for a sampler
    "none": "no weights",
    "token": "step",
    "token_capped": "step, capped",
    "token_dropped": "step, dropped above",
    "sequence": "sequence",
    "sequence_capped": "sequence, capped",
    "sequence_dropped": "sequence, dropped above",
    # rows of the table of algorithms, and causes of a bias
    "reinforce": "REINFORCE",
    "reinforce_to_go": "REINFORCE, reward to go",
    "reinforce_baseline": "REINFORCE, baseline",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "dapo": "DAPO",
    "std": "divided by std",
    "length": "divided by length",
    "sgd": "SGD",
    "adam": "Adam",
    "natural": "natural gradient",
    "trpo": "TRPO",
    # metrics
    "kl": "KL divergence (nats)",
    "ess": "effective sample size (share)",
    "clip_fraction": "clip fraction (share of steps)",
    "explained_variance": "explained variance (share)",
    "grad_norm": "gradient norm",
    "noise_scale": "noise scale (episodes or lanes)",
    "episode_return": "episode return",
    "episode_length": "episode length (steps)",
    "entropy": "entropy (nats)",
}  # fmt: skip


def words(name: str) -> str:
    """The words for a name; a name that has none, without its underscores.

    >>> words("rtg_value"), words("gae_0.95"), words("learning_rate")
    ('reward to go − V', 'advantages, λ = 0.95', 'learning rate')
    """
    prefix, _, number = name.partition("_")
    if prefix in ("gae", "clipped") and number.replace(".", "").isdigit():
        return f"advantages, λ = {number}" if prefix == "gae" else f"clipped at ε = {number}"
    return WORDS.get(name, name.strip("_").replace("_", " "))
