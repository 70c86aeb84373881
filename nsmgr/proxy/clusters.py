"""What a cluster says of itself on all that leaves or enters it (`wire.md` §9.4). Pure."""

import yaml


def parse(text: str) -> dict[str, str]:
    """The labels in a file's text, a YAML map of texts; ValueError says what is wrong."""
    read = yaml.safe_load(text) or {}
    if not isinstance(read, dict):
        raise ValueError(  # noqa: TRY004 - the file's value is wrong, not our types
            f"lines of the form LABEL: VALUE are expected, not a {type(read).__name__}"
        )
    return {str(key): str(value) for key, value in read.items()}
