"""The outside world: settings, the artifact store, the device, the local servers, Prefect's deployments.

Knows nothing of tuning.
"""
