"""The contract of tasks, data and callbacks, as checks that an outside package runs in its own tests.

    from trainerkit.testing import check_callback, check_task

    def test_my_task(tmp_path):
        check_task(lambda: MyTask(), lambda: MyData(), tmp_path)

    def test_my_callback(tmp_path):
        check_callback(lambda: MyCallback(), tmp_path)

Each raises AssertionError with a sentence that says what is missing.
"""

from trainerkit.testing.callback import check_callback, check_together, examine_callback
from trainerkit.testing.task_and_data import check_data, check_task

__all__ = ["check_callback", "check_data", "check_task", "check_together", "examine_callback"]
