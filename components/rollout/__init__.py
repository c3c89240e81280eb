"""Exported policy + verdict -> the service's repository, and a request to its PolicyService."""
