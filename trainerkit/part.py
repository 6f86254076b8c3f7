"""What configs may build beside modules, callbacks and the like."""


class Part:
    """Base of the small classes that tasks and data modules are made of and that a config may name as a `_target_`.

    Of trainerkit's own code a config builds only what is meant for it (`trainerkit.plugins`). A subclass must do
    nothing when it is built that a stranger's config may not do: run code, or write files.
    """
