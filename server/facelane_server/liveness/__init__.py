"""What liveness scores are worth: pure, but for the file of calibrations.

``band``: from which score on a face is LIVE or SPOOF. ``calibration``: the band of one source, from
what its own faces score. ``sequential``: how many looks at a track it takes to believe them.
``records``: calibrations at rest.
"""
