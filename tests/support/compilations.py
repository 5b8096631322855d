"""What is compiled while a test runs."""

import jax


def compilations(but=""):
    """A list that grows with the name of every program that is compiled from now on, `but` that of one name."""
    compiled = []

    def hear(event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration") and not (but and fun_name == but):
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(hear)
    return compiled
