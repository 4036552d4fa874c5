"""The numbers of a device and its links (`megalong.planning.cluster`), measured where this runs.

`clock`: how calls are timed, by all ranks at once. `device`: products, attention, memory, calls of
operators. `links`: collectives between the ranks. tools/calibrate_device.py is the command.
"""
