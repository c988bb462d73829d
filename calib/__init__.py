import engines  # noqa: F401  # switches telemetry off before OpenVINO is loaded
