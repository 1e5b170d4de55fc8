"""Model levels of ECMWF's L137, which ERA5 and AtmoRep's networks have, and their pressures.

Numbers count from the top of the atmosphere, 1 to 137. The pressure of a level depends on that at
the surface; positions of networks take that of the standard atmosphere, whose surface has 1013.25
hPa. Levels of pressure that are whole numbers never are among these, so both can be told apart.
"""

# hPa in the middle of each level: ECMWF, L137 model level definitions (ICAO standard atmosphere)
L137_HPA = (
    *(0.01, 0.0255, 0.0388, 0.0575, 0.0829, 0.1168, 0.1611, 0.218, 0.2899, 0.3793, 0.4892, 0.6224),
    *(0.7821, 0.9716, 1.1942, 1.4535, 1.7531, 2.0965, 2.4875, 2.9298, 3.427, 3.9829, 4.601),
    *(5.2851, 6.0388, 6.8654, 7.7686, 8.7516, 9.8177, 10.9703, 12.2123, 13.5469, 14.977, 16.5054),
    *(18.1348, 19.8681, 21.7076, 23.656, 25.7156, 27.8887, 30.1776, 32.5843, 35.1111, 37.7598),
    *(40.5321, 43.4287, 46.4498, 49.5952, 52.8644, 56.2567, 59.7721, 63.4151, 67.1941, 71.1187),
    *(75.1999, 79.4496, 83.8816, 88.5112, 93.3527, 98.4164, 103.71, 109.2417, 115.0198, 121.0526),
    *(127.3487, 133.917, 140.7663, 147.9058, 155.3448, 163.0927, 171.1591, 179.5537, 188.2867),
    *(197.3679, 206.8078, 216.6166, 226.805, 237.3837, 248.3634, 259.7553, 271.5704, 283.82),
    *(296.5155, 309.6684, 323.2904, 337.3932, 351.9887, 367.0889, 382.7058, 398.8516, 415.5387),
    *(432.7792, 450.5858, 468.9708, 487.947, 507.5021, 527.5696, 548.0312, 568.7678, 589.6797),
    *(610.6646, 631.6194, 652.4424, 673.0352, 693.3043, 713.1631, 732.5325, 751.3426, 769.5329),
    *(787.0528, 803.8622, 819.9302, 835.2358, 849.7668, 863.519, 876.4957, 888.7066, 900.1669),
    *(910.8965, 920.9193, 930.2618, 938.9532, 947.024, 954.5059, 961.4311, 967.8315, 973.7392),
    *(979.1852, 984.2002, 988.8133, 993.0527, 996.9452, 1000.5165, 1003.7906, 1006.79, 1009.5363),
    1012.0494,
)


def is_model_level(number: float) -> bool:
    """Whether a number is that of one of the 137 model levels."""
    return number == int(number) and 1 <= number <= len(L137_HPA)


def standard_pressure(number: int) -> float:
    """hPa of a level in the standard atmosphere.

    Raises:
        ValueError: no such level.
    """
    if not is_model_level(number):
        raise ValueError(f"level {number} is no number of a model level, 1 to {len(L137_HPA)}")
    return L137_HPA[number - 1]
