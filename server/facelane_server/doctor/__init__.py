"""``facelane-server doctor``: is this machine, with this config, fit to serve?"""
