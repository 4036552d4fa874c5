"""A run that SIGNAL had asked to stop while it was starting: `early_run.py SIGNAL FLAGS`."""

import sys

import pretrain_longnet

pretrain_longnet.main(sys.argv[2:], asked=[int(sys.argv[1])])
