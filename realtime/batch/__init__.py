"""Whole files, in segments that stand for themselves.

::

    plan.make_plan     packets only: a Clip with its Segments, cut at key frames       (clip.py says what they are)
    work.run_segments  segments ─► packets.py, decode.py ─► the frame loop ─► pieces.py: rows, video, record of each
    merge.merge        records of all ─► rows.py, join.py, tally.py, report.py: the results
    job.Job            the folder in which all that lies, and what of it is done
    run.process_all    the above for every source, here

A segment's files depend on clip, segment and settings alone, so who works on which, when, and how often it was killed does not
show in the results.
"""
