"""The steps of a night, one module a step, as plain functions that the flows wrap for Prefect."""
