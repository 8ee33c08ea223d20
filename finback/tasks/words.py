"""Word and name lists of the tasks: common English words of 3 to 16 letters, and short first names."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split()))


WORDS = _words("""
    strawberry banana mississippi raspberry blueberry blackberry cranberry cherry apple orange lemon melon peach
    apricot pineapple coconut avocado mango papaya grape tomato potato carrot onion garlic cabbage broccoli spinach
    lettuce pepper cucumber pumpkin celery radish turnip mushroom zucchini eggplant parsley cinnamon ginger vanilla
    chocolate coffee butter cheese bread cookie biscuit pancake sandwich noodle spaghetti dinner breakfast lunch
    supper kitchen bottle kettle saucer spoon knife fork plate glass cup bowl table chair window door floor ceiling
    wall roof chimney garden flower grass tree forest river mountain valley meadow island ocean desert jungle beach
    harbor bridge tunnel street avenue highway railway station airport village city country continent planet comet
    star moon sun galaxy universe weather thunder lightning rainbow storm snow cloud rain wind hurricane tornado
    summer winter autumn spring january february march april may june july august september october november december
    monday tuesday wednesday thursday friday saturday sunday morning evening night midnight noon today tomorrow
    yesterday minute second hour week month year century decade calendar clock watch red blue green yellow purple
    violet orange brown black white silver golden crimson scarlet turquoise elephant giraffe zebra lion tiger leopard
    cheetah panther monkey gorilla kangaroo koala rabbit squirrel hedgehog beaver otter badger raccoon weasel hamster
    mouse cat dog horse donkey cow sheep goat pig chicken rooster turkey duck goose swan eagle falcon parrot pigeon
    sparrow penguin ostrich flamingo whale dolphin shark octopus lobster shrimp salmon turtle lizard crocodile
    alligator snake frog toad spider beetle butterfly mosquito grasshopper dragonfly bee ant wasp doctor nurse
    teacher student engineer lawyer farmer fisherman carpenter plumber electrician mechanic pilot sailor soldier
    captain officer manager secretary president minister governor mayor senator judge butcher baker waiter cook
    barber tailor painter sculptor musician singer dancer actor writer poet author editor journalist scientist
    professor mother father sister brother daughter son uncle aunt cousin nephew niece grandmother grandfather
    parent child baby friend neighbor stranger visitor customer guitar piano violin trumpet trombone clarinet flute
    drum harmonica accordion orchestra symphony melody rhythm harmony concert theater cinema museum library gallery
    hospital school university college kindergarten classroom laboratory factory warehouse office market grocery
    pharmacy restaurant hotel castle palace temple church cathedral monastery football baseball basketball volleyball
    tennis hockey cricket badminton swimming running cycling climbing sailing wrestling boxing fencing archery
    bicycle motorcycle automobile tractor truck bus train tram airplane helicopter rocket balloon submarine ship
    boat canoe ferry hammer screwdriver wrench pliers saw drill ladder bucket shovel rake needle thread button
    zipper pocket collar sleeve jacket sweater trousers skirt dress shirt sock shoe boot slipper sandal glove
    scarf hat helmet umbrella necklace bracelet earring ring mirror pillow blanket mattress curtain carpet candle
    lamp lantern battery camera computer keyboard monitor printer telephone television radio internet software
    hardware program database algorithm network memory processor electricity magnetism gravity energy velocity
    acceleration temperature pressure volume density molecule atom electron proton neutron nucleus hydrogen helium
    oxygen nitrogen carbon calcium sodium potassium aluminum copper iron steel silver platinum mercury uranium
    diamond emerald ruby sapphire crystal marble granite limestone volcano earthquake avalanche glacier waterfall
    lagoon peninsula archipelago atmosphere hemisphere equator longitude latitude geography history mathematics
    geometry algebra arithmetic calculus statistics probability chemistry biology physics astronomy philosophy
    psychology sociology economics literature grammar vocabulary dictionary encyclopedia alphabet sentence paragraph
    chapter novel poem story letter envelope postcard newspaper magazine journal diary notebook pencil crayon eraser
    ruler scissors paper cardboard happiness sadness anger jealousy curiosity courage patience kindness generosity
    honesty loyalty wisdom knowledge intelligence imagination creativity success failure adventure journey vacation
    holiday birthday wedding anniversary celebration ceremony tradition culture language government democracy
    parliament election constitution justice freedom liberty equality independence revolution committee assessment
    possession successful unnecessary bookkeeper accommodation embarrassment occurrence parallel millennium
    recommendation misspelling tattoo raccoon bubble puzzle pizza jazz buzz fuzzy dizzy giggle wiggle waggle
    hobby ribbon rabbit cotton kitten mitten written bitter better letter litter ladder paddle saddle middle puddle
    coffee toffee waffle ruffle muffin puffin traffic office effort different difficult beautiful wonderful powerful
    careful peaceful grateful terrible horrible possible impossible visible invisible responsible comfortable
    valuable reasonable remarkable available incredible important interesting excellent intelligent independent
    dangerous mysterious delicious precious serious curious obvious anxious cautious ancient modern simple complex
    gentle humble noble stable flexible fragile hostile fertile sterile above below under over between behind
    beside around through across against without within because although however therefore whenever wherever
    whatever whoever nothing something anything everything nobody somebody anybody everybody explain describe
    discover invent create destroy build repair improve reduce increase multiply divide subtract measure compare
    consider remember forget believe understand imagine wonder suppose promise protect prepare prevent produce
    receive deliver collect connect separate together forever always never sometimes often seldom rarely usually
    queue rhyme syzygy crypt gypsy lynx onyx sphinx quartz kayak level radar rotor civic noon racecar deified
    bazaar banjo jigsaw pajamas hijack jukebox quizzical zigzag abracadabra hippopotamus rhinoceros chimpanzee
    caterpillar hummingbird woodpecker nightingale refrigerator thermometer microscope telescope kaleidoscope
""")

NAMES = _words("""
    Adam Alan Alex Alice Amy Anna Ben Bella Bob Carl Carol Clara Dan David Dora Ed Ella Emma Eric Eva Fay Fred Gina
    Grace Hana Henry Ian Ida Ivan Jack Jane Joe Julia Karl Kate Ken Lea Leo Lily Liam Lucy Mark Mary Max Mia Nina Noah
    Nora Olga Oscar Paul Peter Rosa Ruth Sam Sara Sofia Tina Tom Uma Vera Victor Will Yara Zoe
""")
