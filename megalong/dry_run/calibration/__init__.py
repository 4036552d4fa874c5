"""The numbers of a device and its links (`megalong.dry_run.cluster`), measured where this runs.

`clock`: how calls are timed, by all ranks at once. `device`: products, attention, memory. `host`:
what the program around an operator takes. `links`: collectives between the ranks. `description`:
the file that says so. tools/calibrate_device.py is the command.
"""
