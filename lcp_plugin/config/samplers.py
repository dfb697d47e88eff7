"""The samplers that can be asked for, by kohya's names."""

SAMPLERS = (
    *("ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a"),
    *("dpmsolver", "dpmsolver++", "dpmsingle"),
    *("k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"),  # the same as those without k_
)
FROM_PURE_NOISE = ("ddim", "euler", "euler_a", "k_euler", "k_euler_a", "dpmsolver++")
