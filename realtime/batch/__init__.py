"""Whole files, worked on in segments. A segment's result depends on nothing but the segment and the
settings.

::

    plan.make_plan       reads packets only: a Clip with its Segments, cut at key frames
    encode.run_segments  segments ─► segment.py ─► frame loop ─► rows, video, record of each
    merge.merge          all records ─► report.py (rows, page), merge.py (video, sound)
    job.Job              the folder that holds all this, and which segments are done
    run.process_all      all of the above for every source, on this machine

A segment's files depend on clip, segment and settings alone. So the results do not show which
worker did it, when, or how often it was killed.
"""
