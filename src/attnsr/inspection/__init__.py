"""Looking inside the networks: figures of what the attention of each does, and the local attribution map.

One stem for each network (``elan``, ``dlgsanet``, ``asid``, ``lcoan``) examines a network on a picture, which gives
the numbers, and draws them; ``lam`` has the local attribution map of any network, ``scene`` the picture and the pixel,
``figures`` what drawing shares, ``command`` the command line.
"""
