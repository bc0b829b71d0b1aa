"""What is known of the published networks beyond the files in ``golden``."""

# {variant: parameters that are trained, at x2, x3, x4}.
PARAMETERS = {
    'elan': (8_254_092, 8_278_407, 8_312_448),
    'elan_light': (582_012, 590_127, 601_488),
    'dlgsanet': (4_733_724, 4_745_889, 4_762_920),
    'dlgsanet_light': (745_188, 751_683, 760_776),
    'dlgsanet_tiny': (565_710, 572_205, 581_298),
    'asid': (297_516, 304_011, 313_104),
    'asid_d8': (732_146, 738_641, 747_734),
    'lcoan': (14_340_227, 15_078_147, 14_930_563),
}
