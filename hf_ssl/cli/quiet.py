"""The screen belongs to our own lines: other libraries speak only when something is wrong."""


def quiet_libraries() -> None:
    """Switch off progress bars and reports of transformers and datasets, whenever they were imported."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
