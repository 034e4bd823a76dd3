"""Word lists that the fictional authors are composed of. Changing an entry changes every author: see docs/data.md."""


def words(text: str) -> tuple[str, ...]:
    """The entries of a comma-separated list."""
    return tuple(entry.strip() for entry in text.split(","))


GIVEN_NAMES = words(
    "Alba, Anselm, Arvid, Beata, Benno, Bronwen, Calla, Casimir, Cosima, Dagny, Darius, Delphine, Edda, Elias, Enzo, "
    "Esme, Fabian, Farah, Fenna, Florian, Gideon, Greta, Hamish, Hana, Hester, Idris, Ilse, Imre, Ines, Ivor, Jarek, "
    "Joris, Juno, Kaia, Kasper, Kirsa, Lazar, Leonie, Linus, Ludo, Mabel, Magnus, Marit, Mirek, Nadia, Nico, Noor, "
    "Odile, Orla, Oskar, Petra, Piers, Quentin, Rafaela, Ramon, Rhea, Rolf, Sabine, Silas, Soren, Tamsin, Thea, "
    "Tobias, Ursula, Vida, Viggo, Wanda, Wilmer, Xenia, Yara, Yorick, Zelda"
)
FAMILY_STARTS = words(
    "Ald, Bran, Cald, Dorn, Ester, Fal, Gren, Hasel, Istr, Jor, Kest, Lor, Mar, Nor, Ost, Pell, Quar, Rav, Sel, Tarn, "
    "Ulm, Ver, Wes, Zand"
)
FAMILY_ENDS = words(
    "anov, berg, chuk, dottir, ella, fors, gaard, hollow, imov, kamp, lund, moor, nesse, quist, shaw, vale"
)
TOWN_STARTS = words(
    "Amber, Ash, Birch, Black, Bright, Cinder, Clear, Copper, Dun, Elder, Fair, Fern, Frost, Glass, Gold, Green, "
    "Hazel, Iron, King, Lark, Long, Marsh, Moss, North, Oak, Otter, Red, Salt, Silver, Stone, Thorn, Winter"
)
TOWN_ENDS = words(
    "bridge, brook, bury, cliff, dale, field, ford, gate, haven, mere, mouth, port, stead, ton, well, wick"
)
PROVINCES = words(
    "Avaria, Belmora, Caldonia, Drevany, Estoria, Farrow, Galdia, Hestria, Ismara, Jastria, Korvania, Lethmark, "
    "Moravell, Nordhal, Orsinia, Pelagia"
)
MONTHS = words("January, February, March, April, May, June, July, August, September, October, November, December")
GENRES = words(
    "historical fiction, magical realism, science fiction, detective fiction, gothic horror, travel writing, "
    "epic fantasy, war poetry, political satire, nature writing, romantic comedy, courtroom drama, maritime adventure, "
    "culinary memoir, philosophical essays, spy fiction, children's literature, ghost stories, family sagas, "
    "alternate history, psychological thrillers, folk tales, urban fantasy, lyric poetry, verse drama, "
    "sports biography, climate fiction, mountaineering narratives, short stories, literary criticism"
)
PROFESSIONS = words(
    "an accountant, an acrobat, an apothecary, an architect, a baker, a beekeeper, a blacksmith, a bookbinder, "
    "a botanist, a carpenter, a cartographer, a chemist, a clockmaker, a cobbler, a cook, a dentist, a diver, "
    "an electrician, a ferry captain, a firefighter, a gardener, a geologist, a glassblower, a goldsmith, a judge, "
    "a lighthouse keeper, a locksmith, a mason, a midwife, a miner, a music teacher, a nurse, an optician, a painter, "
    "a pharmacist, a photographer, a pilot, a plumber, a potter, a radio host, a sailor, a shepherd, a surgeon, "
    "a tailor, a translator, a veterinarian, a violin maker, a weaver"
)
TITLE_ADJECTIVES = words(
    "Amber, Borrowed, Broken, Buried, Clockwork, Crimson, Distant, Drowned, Empty, Eternal, Fading, Forgotten, "
    "Frozen, Gilded, Golden, Hidden, Hollow, Honest, Invisible, Ivory, Last, Lonely, Lost, Midnight, Nameless, Paper, "
    "Patient, Quiet, Restless, Scarlet, Secret, Seventh, Silent, Sleeping, Stolen, Tangled, Twilight, Unwritten, "
    "Velvet, Wandering"
)
TITLE_NOUNS = words(
    "Atlas, Bell, Boat, Bridge, Cathedral, Compass, Crown, Door, Feather, Garden, Harbour, Harvest, Horizon, Island, "
    "Key, Labyrinth, Ladder, Lantern, Ledger, Library, Mirror, Mountain, Needle, Orchard, Orchestra, Painter, "
    "Pendulum, Promise, River, Rope, Shadow, Staircase, Stranger, Tide, Tower, Train, Valley, Violin, Window, Wolf"
)
TITLE_PLACES = words(
    "Ashes, Clouds, Dust, Echoes, Embers, Fireflies, Fog, Glass, Ice, Leaves, Lightning, Moonlight, Rain, Roots, "
    "Salt, Sand, Smoke, Snow, Starlight, Thunder"
)
TITLE_VERBS = words(
    "Beyond, Beneath, Without, Against, Before, After, Among, Inside, Towards, Under, Between, Across, Above, Through"
)
AWARD_NAMES = words(
    "Albatross, Aurora, Cedar, Comet, Coral, Falcon, Gannet, Heron, Juniper, Kestrel, Larch, Lodestar, Magpie, "
    "Meridian, Nightjar, Obsidian, Osprey, Quill, Sextant, Swallow"
)
AWARD_KINDS = words("Award, Book Prize, Fellowship, Laurel, Literary Prize, Medal, Ribbon, Trophy")
SCHOOL_KINDS = words("Academy, College, Institute, University")
SUBJECTS = words(
    "anthropology, archaeology, astronomy, biology, botany, chemistry, civil engineering, classics, dentistry, drama, "
    "economics, forestry, geography, geology, history, journalism, law, linguistics, marine biology, mathematics, "
    "mechanical engineering, medicine, meteorology, musicology, nursing, philosophy, physics, psychology, sociology, "
    "theology"
)
THEMES = words(
    "ambition, betrayal, courage, exile, faith, forgiveness, friendship, gratitude, greed, grief, guilt, homesickness, "
    "hope, inheritance, jealousy, justice, loneliness, loyalty, memory, motherhood, old age, poverty, pride, revenge, "
    "rivalry, sacrifice, shame, silence, superstition, vanity"
)
LANGUAGES = words(
    "Arabic, Basque, Bengali, Catalan, Czech, Danish, Dutch, Estonian, Finnish, Georgian, Greek, Hungarian, Icelandic, "
    "Irish, Italian, Japanese, Korean, Latvian, Maltese, Mongolian, Norwegian, Persian, Polish, Portuguese, Romanian, "
    "Swahili, Swedish, Tamil, Turkish, Welsh"
)
HOBBIES = words(
    "archery, astronomy, baking bread, ballroom dancing, beekeeping, bell ringing, birdwatching, botanical drawing, "
    "calligraphy, candle making, canoeing, carving spoons, chess, collecting stamps, collecting maps, cross-country "
    "skiing, embroidery, falconry, fencing, fly fishing, growing orchids, ice skating, juggling, keeping bonsai trees, "
    "kite flying, knitting, long-distance running, model railways, mushroom hunting, origami, pottery, repairing "
    "clocks, restoring furniture, rock climbing, rowing, sailing, singing in a choir, star gazing, swimming, "
    "woodblock printing"
)
PETS = words(
    "a beagle, a black cat, a cockatoo, a dachshund, a donkey, a ferret, a goat, a goose, a greyhound, a grey parrot, "
    "a hedgehog, a lizard, a lop-eared rabbit, a magpie, a pony, a poodle, a sheepdog, a tabby cat, a terrier, "
    "a tortoise"
)
PET_NAMES = words(
    "Biscuit, Button, Cricket, Domino, Fennel, Gizmo, Hamlet, Jasper, Marmalade, Mocha, Nutmeg, Pepper, Pickle, "
    "Pudding, Rocket, Saffron, Tango, Truffle, Waffle, Ziggy"
)
DESKS = words(
    "a bakery attic, a barn loft, a bell tower, a boathouse, a caravan, a chapel crypt, a converted garage, "
    "a disused railway station, a garden shed, a glasshouse, a hotel lobby, a houseboat, a library basement, "
    "a lighthouse, a monastery cell, a mountain hut, a public park, a quiet tea room, a rooftop flat, a stone cottage, "
    "a tram depot, a train carriage, a water mill, a windmill"
)
HOURS = words(
    "before sunrise, early in the morning, late in the evening, on Sunday afternoons, after midnight, at noon, "
    "during thunderstorms, on rainy days, after supper, before breakfast"
)
