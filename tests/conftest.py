"""Settings of the whole suite: a busy machine is no failure."""

from hypothesis import HealthCheck, settings

settings.register_profile("thor_fx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("thor_fx")
