"""Common English words: an adjective and a noun, "brave-otter", make a key of a task."""

_ADJECTIVES = """
    able amber ancient bold brave bright brisk broad calm careful cheerful clear clever cold
    curious dark deep distant eager early easy empty faint famous fancy fast fierce fine
    firm fresh friendly gentle glad golden grand great green happy heavy hidden honest
    humble icy jolly keen kind large late lively lonely loud lucky mellow merry mighty mild
    modern narrow neat noble old pale patient plain polite proud quick quiet rapid rare
    ready red rich rough round royal sharp shiny short shy silent silver simple sleepy slow
    small smooth soft solid spare steady steep strange strong sunny sweet swift tall tame
    tender thick thin tidy tiny tough true vast warm wary wide wild wise witty young zealous
"""

_NOUNS = """
    anchor apple arrow badger barrel basket beacon bear beaver bell bird boat bottle branch
    bread bridge brook bucket button cabin camel candle canyon carpet castle cedar chair
    cherry circle clock cloud coast coin comet copper coral cottage cricket crow crown
    dancer desert dolphin door dragon drum eagle engine falcon farmer feather fern ferry
    field finch fire flag flute forest fox frog garden gate ghost glacier goose grape hammer
    harbor hat hawk heron hill horse house island jacket jewel kettle key kite ladder lake
    lamp lantern leaf lemon lion lizard lobster magnet maple marble market meadow mirror
    monkey moon moose mountain mouse needle nest oak ocean olive orange orchard otter owl
    paddle paper parrot peach pebble pencil penguin pepper piano pigeon pillow pine planet
    plum pocket pony potato puppet rabbit raven ribbon river robin rocket rose saddle sailor
    salmon sparrow spider spoon squirrel stone stove swan table teapot temple tiger timber
    tower train trumpet tulip tunnel turtle valley violin wagon walnut whale wheel willow
    window wolf zebra
"""

ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
