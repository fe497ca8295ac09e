"""The version that is installed."""

from importlib import metadata


def installed_version() -> str:
    try:
        return metadata.version("qorpo")
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        return "0+unknown"
