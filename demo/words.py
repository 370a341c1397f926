"""The word lists behind the demo corpus: topics, cities, haiku lines, recipes, translations, small facts.

A topic is `name | emojis | definition`; `~name` is a mass noun (rice), `!name` takes "the" (the moon).
"""

# ruff: noqa: E501


def split_lines(block: str) -> list[str]:
    """The items of a block, which stand on lines of their own or between bars."""
    return [item for row in block.strip().splitlines() for item in row.split("|")]


ANIMALS = """
cat|🐱 🐾 🐭 🧶|a small pet that purrs and hunts mice
dog|🐶 🦴 🐾 🎾|a loyal pet that likes long walks
fox|🦊 🌲 🍂 🌙|a clever red animal with a bushy tail
wolf|🐺 🌕 🌲 ❄️|a wild hunter that lives in a pack
bear|🐻 🍯 🌲 🐟|a large animal that sleeps through the winter
panda|🐼 🎋 🍃 🇨🇳|a black and white bear that eats bamboo
tiger|🐯 🌿 🐾 🔥|a big striped cat that hunts alone
lion|🦁 👑 🌅 🐾|a big cat that lives in a pride
horse|🐴 🌾 🏇 🥕|a fast animal that people like to ride
cow|🐮 🥛 🌾 🌱|a farm animal that eats grass and gives milk
pig|🐷 🌽 🏡 💤|a clever farm animal that likes mud
sheep|🐑 🧶 🌱 🐾|a farm animal that gives us wool
goat|🐐 ⛰️ 🌿 🧀|a climbing animal that eats almost anything
rabbit|🐰 🥕 🌱 🐾|a small animal with long ears and soft fur
mouse|🐭 🧀 🏡 🐾|a tiny animal that likes cheese and quiet corners
elephant|🐘 🌿 💧 🌍|a huge gray animal with a long trunk
monkey|🐵 🍌 🌴 🙈|a playful animal that swings from tree to tree
giraffe|🦒 🌿 🌅 🌍|a very tall animal with a long neck
zebra|🦓 🌾 🌅 🌍|a wild horse with black and white stripes
camel|🐪 🏜️ ☀️ 💧|a desert animal that can walk for days without water
kangaroo|🦘 🌅 🇦🇺 🌾|a jumping animal that carries its young in a pouch
koala|🐨 🌿 💤 🇦🇺|a sleepy animal that lives in trees
hedgehog|🦔 🍂 🌙 🍎|a small night animal covered with spines
squirrel|🐿️ 🌰 🌳 🍂|a small animal that hides nuts for the winter
owl|🦉 🌙 🌲 🐭|a night bird with big eyes and silent wings
eagle|🦅 ⛰️ ☀️ 🪶|a large bird with very sharp eyes
duck|🦆 💧 🌾 🐣|a water bird that swims on ponds
swan|🦢 💧 🤍 🌿|a white water bird with a long neck
penguin|🐧 ❄️ 🐟 🌊|a black and white bird that swims but cannot fly
parrot|🦜 🌴 🌈 🥜|a bright bird that can repeat words
chicken|🐔 🥚 🌽 🐣|a farm bird that lays eggs
frog|🐸 💧 🌿 🪰|a small green animal that jumps and croaks
turtle|🐢 🌊 🐚 🌿|a slow animal that carries its house on its back
snake|🐍 🌿 🪨 ☀️|a long animal without legs
crocodile|🐊 💧 🌴 😬|a dangerous river animal with many teeth
dolphin|🐬 🌊 💦 😊|a clever sea animal that likes to play
whale|🐳 🌊 💦 💙|the largest animal of the sea
shark|🦈 🌊 😬 🐟|a fast hunter of the sea with many teeth
octopus|🐙 🌊 🪸 💜|a sea animal with eight arms and a sharp mind
crab|🦀 🏖️ 🌊 🪨|a sea animal that walks sideways
snail|🐌 🌿 🌧️ 🏡|a very slow animal with a round shell
bee|🐝 🌼 🍯 ☀️|a small insect that makes honey
butterfly|🦋 🌸 ☀️ 🌿|an insect with large and bright wings
ant|🐜 🌱 🍂 👷|a tiny insect that works all day
spider|🕷️ 🕸️ 🌙 🪰|a small animal with eight legs that spins webs
bat|🦇 🌙 🌲 🦟|a flying animal that hunts at night
deer|🦌 🌲 🌿 🌅|a shy forest animal with long legs
otter|🦦 💧 🐟 🌊|a playful animal that swims on its back
seal|🦭 🌊 🐟 ❄️|a sea animal that rests on rocks and ice
peacock|🦚 💙 💚 ✨|a proud bird with a splendid tail
"""

FOODS = """
~pizza|🍕 🧀 🍅 🇮🇹|a flat bread with tomato and cheese
~bread|🍞 🌾 🧈 🔥|a food baked from flour and water
~cheese|🧀 🥛 🐮 🍷|a food made from milk
~rice|🍚 🌾 🥢 💧|a grain that grows in wet fields
~pasta|🍝 🍅 🧀 🇮🇹|a food made from flour and served with sauce
~soup|🍲 🥕 🥄 🔥|a hot meal that is eaten with a spoon
~salad|🥗 🥬 🍅 🥒|a cold dish of fresh leaves and vegetables
~sushi|🍣 🍚 🐟 🇯🇵|a dish of rice and raw fish
~chocolate|🍫 🤎 😋 🍬|a sweet food made from cocoa beans
~honey|🍯 🐝 🌼 💛|a sweet food made by bees
~butter|🧈 🥛 🍞 🐮|a soft food made from cream
~coffee|☕ 🤎 🌅 😊|a hot and bitter drink that keeps people awake
~tea|🍵 🍃 🫖 😌|a warm drink made from leaves
~milk|🥛 🐮 🤍 🍼|a white drink that comes from cows
~wine|🍷 🍇 🧀 🌅|a drink made from grapes
~ice cream|🍦 🍨 ☀️ 😋|a cold and sweet dessert
~popcorn|🍿 🌽 🎬 🧈|a light snack made from corn
~garlic|🧄 🍳 😋 🌿|a white bulb with a strong taste
~curry|🍛 🌶️ 🍚 🇮🇳|a hot dish with many spices
~corn|🌽 🌾 ☀️ 💛|a yellow grain that grows in tall rows
apple|🍎 🌳 🍏 🥧|a round fruit that grows on trees
banana|🍌 🐵 🌴 💛|a long yellow fruit with soft flesh
orange|🍊 ☀️ 🌳 🧡|a round fruit full of sweet juice
lemon|🍋 💛 🍵 😖|a yellow fruit with a sour taste
grape|🍇 🍷 🌿 💜|a small fruit that grows in bunches
strawberry|🍓 🌱 🍰 ❤️|a small red fruit that tastes of summer
cherry|🍒 🌳 🌸 ❤️|a small red fruit with a hard stone
peach|🍑 🌳 ☀️ 🧡|a soft fruit with a velvet skin
melon|🍈 ☀️ 💧 💚|a large fruit full of water
mango|🥭 🌴 ☀️ 🧡|a sweet fruit from warm countries
coconut|🥥 🌴 🏝️ 🤍|a large nut with white flesh and sweet water
tomato|🍅 🌱 🥗 ❤️|a red fruit that is used like a vegetable
potato|🥔 🌱 🍟 🍲|a vegetable that grows under the ground
carrot|🥕 🐰 🌱 🧡|a long orange root that rabbits love
onion|🧅 😢 🍳 🍲|a vegetable that makes people cry
mushroom|🍄 🌲 🌧️ 🍂|a soft plant-like food from the forest floor
pumpkin|🎃 🍂 🥧 🧡|a large orange vegetable of the autumn
cake|🎂 🍰 🕯️ 🎉|a sweet food for birthdays
cookie|🍪 🥛 🍫 😋|a small sweet cake baked in the oven
sandwich|🥪 🍞 🧀 🥬|a meal between two slices of bread
pancake|🥞 🧈 🍯 😋|a flat cake fried in a pan
egg|🥚 🐔 🍳 🐣|a food laid by hens
"""

THINGS = """
book|📖 📚 🤓 ✨|a set of pages that tells a story
pencil|✏️ 📝 📒 🎨|a thin tool for writing and drawing
clock|🕰️ ⏰ ⏳ 🔔|a machine that shows the time
lamp|💡 🌙 📖 ✨|a tool that gives light at night
candle|🕯️ 🔥 🌙 ✨|a stick of wax that gives a warm light
key|🔑 🚪 🔒 🏡|a small tool that opens a lock
door|🚪 🏡 🔑 👋|a part of a house that opens and closes
chair|🪑 🏡 😌 📖|a piece of furniture for sitting
bed|🛏️ 💤 🌙 😴|a piece of furniture for sleeping
window|🪟 ☀️ 🏡 🌧️|an opening in a wall that lets in the light
mirror|🪞 😊 ✨ 👀|a smooth glass that shows your face
umbrella|☂️ 🌧️ 💧 🌂|a round roof that you carry in the rain
hat|🎩 ☀️ 👒 😎|a thing that you wear on your head
shoe|👟 👣 🏃 🧦|a thing that protects your foot
ring|💍 ✨ 💎 ❤️|a small circle worn on a finger
phone|📱 📞 💬 🔋|a machine for talking to people far away
computer|💻 ⌨️ 🖱️ 🤓|a machine that works with numbers and words
camera|📷 📸 🌅 😊|a machine that takes pictures
robot|🤖 ⚙️ 🔋 💡|a machine that can work like a person
car|🚗 🛣️ ⛽ 🚦|a machine with four wheels and a motor
train|🚆 🛤️ 🚉 🎫|a row of wagons that runs on rails
bicycle|🚲 🚴 🌳 😊|a light machine with two wheels and pedals
boat|⛵ 🌊 💨 ⚓|a small ship for rivers and lakes
ship|🚢 🌊 ⚓ 🧭|a large vessel that crosses the sea
plane|✈️ ☁️ 🌍 🧳|a machine that flies above the clouds
rocket|🚀 🌌 🌕 🔥|a machine that flies into space
balloon|🎈 🎉 ☁️ 🌈|a thin bag filled with air
kite|🪁 💨 ☁️ 😊|a light toy that flies on a string
drum|🥁 🎶 🎉 🔊|an instrument that you hit with sticks
guitar|🎸 🎶 🔥 🎤|an instrument with six strings
piano|🎹 🎶 🎼 ✨|an instrument with black and white keys
violin|🎻 🎶 🎼 💫|a small instrument played with a bow
trumpet|🎺 🎶 🎉 🔊|a bright instrument made of brass
bridge|🌉 🌊 🚗 🏙️|a road that crosses a river
castle|🏰 👑 ⚔️ 🐉|a strong house for kings and queens
garden|🌷 🌱 🦋 ☀️|a piece of land with flowers and plants
school|🏫 📚 ✏️ 🎒|a place where children learn
house|🏡 🚪 🌳 ❤️|a building where people live
library|📚 🤫 🏛️ 🤓|a quiet building full of books
museum|🏛️ 🖼️ 🎨 🎫|a building where old and fine things are shown
hammer|🔨 🛠️ 🪵 💪|a tool for driving nails
"""

NATURE = """
~spring|🌸 🌱 🌷 🐣|the season when flowers open
~summer|☀️ 🏖️ 🍦 🌻|the warmest season of the year
~autumn|🍂 🍁 🎃 🌧️|the season when leaves fall
~winter|❄️ ⛄ 🧣 🔥|the coldest season of the year
~rain|🌧️ ☔ 💧 🌈|water that falls from the clouds
~snow|❄️ ⛄ 🤍 🎿|soft white ice that falls in winter
~wind|💨 🍃 🪁 🌊|air that moves
~fire|🔥 🪵 ✨ 🌡️|the light and heat of burning things
~water|💧 🌊 🥛 🐟|a clear liquid that all life needs
~thunder|⛈️ ⚡ 🌩️ 😱|the loud sound that follows lightning
~fog|🌫️ 🌁 🌲 🤫|a cloud that lies on the ground
~love|❤️ 💕 😍 🌹|a warm feeling for someone dear
~music|🎶 🎵 🎸 🎹|sound that is made to please the ear
~sleep|😴 💤 🌙 🛏️|the rest that the body takes at night
~time|⏳ ⏰ 🕰️ 📅|what clocks measure and nobody can stop
~friendship|🤝 😊 💛 👫|a bond between people who like each other
~peace|🕊️ ☮️ 🌿 💙|a time without war
~money|💰 💵 🏦 💳|what people use to pay for things
~happiness|😊 🌈 ☀️ 💛|the feeling of a good day
!moon|🌕 🌙 ✨ 🌌|a ball of rock that travels around the earth
!sun|☀️ 🌅 🌞 💛|the star that gives us light and warmth
!sea|🌊 🐟 ⛵ 💙|the wide salt water between the lands
!ocean|🌊 🐳 🚢 💙|a very large sea
!desert|🏜️ 🐪 ☀️ 🌵|a dry land with sand and little rain
!jungle|🌴 🐒 🦜 🌧️|a thick and warm forest
!beach|🏖️ 🌊 ☀️ 🐚|a strip of sand beside the sea
!earth|🌍 🌱 💧 💙|the planet on which we live
!sky|☁️ 🌤️ 🐦 💙|the blue space above us
star|⭐ ✨ 🌌 🌙|a far ball of fire in the night sky
rainbow|🌈 🌧️ ☀️ ✨|an arch of colors after the rain
mountain|⛰️ 🏔️ ❄️ 🥾|a very high piece of land
river|🏞️ 💧 🐟 🛶|a stream of water that flows to the sea
lake|🏞️ 💧 🦆 🛶|a still water with land all around it
forest|🌲 🌳 🦌 🍄|a place with very many trees
island|🏝️ 🌴 🌊 🐚|a land with water all around it
volcano|🌋 🔥 🪨 💨|a mountain that can throw out fire
tree|🌳 🌱 🍃 🐦|a tall plant with a trunk of wood
rose|🌹 ❤️ 🌿 ✨|a flower with a sweet smell and sharp thorns
flower|🌸 🌼 🐝 ☀️|the bright part of a plant
cloud|☁️ 🌧️ 🌤️ 💭|a white or gray shape of tiny drops
storm|⛈️ ⚡ 💨 🌊|a time of strong wind and heavy rain
"""

SPORTS = """
~football|⚽ 🥅 🏆 🏃|a game in which two teams kick a ball
~tennis|🎾 🏆 👟 ☀️|a game in which players hit a ball over a net
~basketball|🏀 ⛹️ 🏆 👟|a game in which players throw a ball through a ring
~baseball|⚾ 🧢 🏟️ 🏃|a game in which players hit a small hard ball
~golf|⛳ 🌱 ☀️ 🎯|a game in which a small ball goes into a hole
~swimming|🏊 💦 🥇 🌊|a sport in which people move through water
~running|🏃 👟 ⏱️ 🥇|a sport in which the fastest feet win
~cycling|🚴 🚲 ⛰️ 🥇|a sport on two wheels
~skiing|⛷️ 🎿 ❄️ 🏔️|a winter sport on two long boards
~surfing|🏄 🌊 ☀️ 🤙|a sport in which people ride the waves
~chess|♟️ 👑 🤔 ⏳|a quiet game of kings and queens
~boxing|🥊 💪 🏆 🔔|a sport in which two people fight with gloves
~fishing|🎣 🐟 💧 😌|the sport of waiting for a fish
~dancing|💃 🕺 🎶 ✨|the art of moving to music
~yoga|🧘 😌 🌅 🌿|a calm practice for body and mind
~painting|🎨 🖼️ 🖌️ 🌈|the art of making pictures with color
~reading|📖 🤓 🛋️ ☕|the art of finding worlds in words
~cooking|🍳 🔪 🥘 😋|the art of making good meals
~singing|🎤 🎶 😊 🎵|the art of making music with the voice
~camping|⛺ 🔥 🌲 🌌|a holiday in a tent
"""

JOBS = """
doctor|🩺 🤒 💊 🏥|a person who helps the sick
teacher|📚 🏫 ✏️ 🍎|a person who helps others to learn
farmer|🚜 🌽 🌾 🐮|a person who grows our food
baker|🍞 🥐 🔥 🌾|a person who makes bread
cook|🍳 🥘 🔪 🍲|a person who prepares meals
sailor|⚓ ⛵ 🌊 🧭|a person who works on a ship
pilot|✈️ 🧳 ☁️ 🌍|a person who flies a plane
singer|🎤 🎶 🌟 👏|a person who sings for others
painter|🎨 🖼️ 🖌️ 🌈|a person who makes pictures
writer|✍️ 📖 📝 ☕|a person who writes books
soldier|🪖 ⚔️ 🎖️ 💪|a person who serves in an army
firefighter|🚒 🔥 💦 🧯|a person who puts out fires
detective|🕵️ 🔍 👣 🤔|a person who solves crimes
judge|⚖️ 📜 🏛️ 🤔|a person who decides in a court
scientist|🔬 🧪 🤓 💡|a person who studies how the world works
astronaut|🚀 ⭐ 🌕 🌌|a person who travels into space
king|👑 🏰 ⚔️ 💎|a man who rules a country
queen|👸 👑 🏰 💎|a woman who rules a country
wizard|🧙 ✨ 🔮 📜|a person with magic powers in old tales
pirate|☠️ ⚓ 💰 🦜|a robber of the sea
gardener|🌱 🌷 🧤 ☀️|a person who cares for plants
nurse|💉 🩺 🏥 💛|a person who cares for the sick
mechanic|🔧 🚗 🛠️ ⚙️|a person who repairs machines
dancer|💃 🎶 ✨ 👏|a person who moves to music
"""

# name | country | emojis | flag | capital? | three sights as `name = noun phrase`
CITIES = """
Paris|France|🗼 🥐 🎨|🇫🇷|1|The Eiffel Tower = an iron tower with wide views over the whole city; The Louvre = a huge museum that is home to the Mona Lisa; Notre-Dame = a famous cathedral with high stone towers and colored windows
London|England|💂 🎡 🚌|🇬🇧|1|Big Ben = a tall clock tower beside the river; The British Museum = a free museum with treasures from all over the world; Tower Bridge = an old bridge that opens for large ships
Rome|Italy|🍝 ⛲ 🏟️|🇮🇹|1|The Colosseum = an ancient arena where fighters once met; The Trevi Fountain = a white fountain into which people throw coins; The Pantheon = a round temple with an open roof
Berlin|Germany|🐻 🎶 🍺|🇩🇪|1|The Brandenburg Gate = a stone gate that stands for a united country; The Museum Island = an island in the river with five great museums; The Reichstag = a parliament with a glass dome
Madrid|Spain|💃 ☀️ 🎨|🇪🇸|1|The Prado = a museum with great paintings by old masters; The Royal Palace = a white palace with thousands of rooms; Retiro Park = a green park with a small lake for boats
Lisbon|Portugal|🚋 🌊 🐟|🇵🇹|1|Belem Tower = a white tower at the mouth of the river; The Alfama = an old quarter with narrow streets and sad songs; Tram 28 = a yellow tram that climbs the steep hills
Vienna|Austria|🎻 🍰 🎼|🇦🇹|1|Schonbrunn = a yellow palace with wide gardens; The State Opera = a famous house of music; The Prater = a park with a giant old wheel
Prague|Czechia|🏰 🍺 🌉|🇨🇿|1|Charles Bridge = an old stone bridge with many statues; Prague Castle = a large castle above the city; The Old Town Clock = a medieval clock with moving figures
Athens|Greece|🏛️ 🫒 ☀️|🇬🇷|1|The Acropolis = a hill with ancient temples of white stone; The Plaka = an old quarter with small shops and cafes; The Agora = an ancient market where thinkers once talked
Amsterdam|Netherlands|🚲 🌷 🛶|🇳🇱|1|The Canals = a ring of old waterways with narrow houses; The Rijksmuseum = a museum with the finest Dutch paintings; The Anne Frank House = a quiet house where a brave girl wrote her diary
Oslo|Norway|⛷️ 🌲 🛶|🇳🇴|1|The Opera House = a white building with a roof to walk on; Vigeland Park = a park with two hundred statues; The Fram Museum = a museum with a ship from the frozen seas
Stockholm|Sweden|👑 ⛵ ❄️|🇸🇪|1|The Vasa Museum = a museum around a giant wooden ship; The Old Town = a small island with golden houses; Skansen = an open park with old farms and animals
Cairo|Egypt|🐪 🏜️ 🏺|🇪🇬|1|The Pyramids = a group of royal tombs that are very old; The Sphinx = a stone lion with the head of a man; The Egyptian Museum = a museum full of golden treasures
Istanbul|Turkey|🕌 🍵 🐈|🇹🇷|0|Hagia Sophia = a great dome that is fifteen centuries old; The Blue Mosque = a mosque with six towers and blue tiles; The Grand Bazaar = a covered market with thousands of shops
Moscow|Russia|🪆 ❄️ 🏰|🇷🇺|1|Red Square = a wide square in the heart of the city; The Kremlin = a fortress with red walls and golden domes; The Bolshoi = a famous theater for dance and opera
Tokyo|Japan|🍣 🗼 🌸|🇯🇵|1|Tokyo Tower = a red and white tower with fine views; Senso-ji = an old temple with a giant red lantern; Ueno Park = a park that is famous for its cherry trees
Kyoto|Japan|⛩️ 🍵 🌸|🇯🇵|0|The Golden Pavilion = a temple covered with gold beside a pond; Fushimi Inari = a hill with thousands of red gates; The Bamboo Grove = a path between very tall bamboo
Beijing|China|🏯 🐉 🥟|🇨🇳|1|The Forbidden City = a palace where emperors lived for centuries; The Great Wall = a wall that runs over the mountains; The Temple of Heaven = a round temple in a quiet park
Delhi|India|🕌 🐘 🍛|🇮🇳|1|The Red Fort = a large fort with red walls; The Lotus Temple = a white temple in the shape of a flower; India Gate = a tall arch at the end of a wide avenue
Sydney|Australia|🦘 🏄 🌉|🇦🇺|0|The Opera House = a white building with a roof like sails; The Harbour Bridge = a steel bridge that people may climb; Bondi Beach = a long beach that is loved by surfers
New York|America|🗽 🏙️ 🚕|🇺🇸|0|The Statue of Liberty = a giant green lady with a torch; Central Park = a large park between tall buildings; Times Square = a bright square full of lights and theaters
San Francisco|America|🌉 🌁 🚋|🇺🇸|0|The Golden Gate Bridge = a long red bridge over the bay; Alcatraz = an island with an old prison; The Cable Cars = a line of small wagons that climb the hills
Washington|America|🏛️ 🦅 🌸|🇺🇸|1|The White House = a white house where the president lives; The Lincoln Memorial = a marble hall with a giant statue; The Air and Space Museum = a museum with real planes and rockets
Mexico City|Mexico|🌮 🌵 💀|🇲🇽|1|The Zocalo = one of the largest squares of the world; The Blue House = a house where a great painter lived; Chapultepec = a wide park with a castle on a hill
Rio|Brazil|🏖️ ⚽ 💃|🇧🇷|0|Christ the Redeemer = a giant statue with open arms above the city; Sugarloaf = a steep mountain with a cable car; Copacabana = a long beach that is full of life
Venice|Italy|🛶 🎭 🌊|🇮🇹|0|Saint Mark's Square = a grand square with a golden church; The Rialto Bridge = an old bridge with small shops; The Grand Canal = a wide waterway with palaces on both sides
Barcelona|Spain|⚽ ☀️ 🎨|🇪🇸|0|The Sagrada Familia = a great church that looks like a stone forest; Park Guell = a park with colorful tiles; The Rambla = a lively street with trees and flower stalls
Dublin|Ireland|🍀 🍺 🎻|🇮🇪|1|Trinity College = an old school with a splendid library; Dublin Castle = a castle in the heart of the town; The Ha'penny Bridge = a white iron bridge for people on foot
Edinburgh|Scotland|🏰 🌧️ 🐑|🇬🇧|1|Edinburgh Castle = a castle on a black rock above the town; The Royal Mile = an old street with tall stone houses; Arthur's Seat = a green hill with a wide view
Copenhagen|Denmark|🚲 🧜 🧱|🇩🇰|1|The Little Mermaid = a small statue beside the sea; Tivoli = a garden with rides and many lights; Nyhavn = a harbor with bright old houses
Helsinki|Finland|🧖 🌲 ❄️|🇫🇮|1|
Warsaw|Poland|🧜 🥟 🎹|🇵🇱|1|
Budapest|Hungary|♨️ 🌉 🏰|🇭🇺|1|
Brussels|Belgium|🧇 🍫 🍟|🇧🇪|1|
Zurich|Switzerland|🏔️ 🏦 🧀|🇨🇭|0|
Geneva|Switzerland|⛲ ⌚ 🍫|🇨🇭|0|
Munich|Germany|🍺 🥨 ⚽|🇩🇪|0|
Hamburg|Germany|⚓ 🚢 🐟|🇩🇪|0|
Milan|Italy|👗 ⛪ ☕|🇮🇹|0|
Naples|Italy|🍕 🌋 🌊|🇮🇹|0|
Lyon|France|🍷 🧀 🦁|🇫🇷|0|
Nice|France|🏖️ ☀️ 🌊|🇫🇷|0|
Seoul|Korea|🍜 🎶 🏯|🇰🇷|1|
Shanghai|China|🏙️ 🥟 🚄|🇨🇳|0|
Bangkok|Thailand|🛕 🍜 🐘|🇹🇭|1|
Hanoi|Vietnam|🍜 🛵 🌿|🇻🇳|1|
Singapore|Singapore|🦁 🏙️ 🌴|🇸🇬|1|
Jakarta|Indonesia|🌴 🌋 🍛|🇮🇩|1|
Manila|the Philippines|🏝️ ☀️ 🥭|🇵🇭|1|
Dubai|the Emirates|🏙️ 🏜️ 🐪|🇦🇪|0|
Nairobi|Kenya|🦁 🦒 🌅|🇰🇪|1|
Lagos|Nigeria|🎶 🌊 🌴|🇳🇬|0|
Cape Town|South Africa|⛰️ 🐧 🌊|🇿🇦|0|
Marrakesh|Morocco|🕌 🐪 🍵|🇲🇦|0|
Toronto|Canada|🍁 🏒 🏙️|🇨🇦|0|
Montreal|Canada|🍁 ❄️ 🥯|🇨🇦|0|
Vancouver|Canada|🍁 🏔️ 🌊|🇨🇦|0|
Chicago|America|🌬️ 🍕 🎷|🇺🇸|0|
Boston|America|🦞 📚 ⚾|🇺🇸|0|
Miami|America|🏖️ 🌴 😎|🇺🇸|0|
Los Angeles|America|🎬 🌴 ☀️|🇺🇸|0|
Seattle|America|☕ 🌧️ 🏔️|🇺🇸|0|
Havana|Cuba|🚗 💃 🎺|🇨🇺|1|
Lima|Peru|🦙 🐟 ⛰️|🇵🇪|1|
Buenos Aires|Argentina|💃 ⚽ 🥩|🇦🇷|1|
Santiago|Chile|🏔️ 🍷 🌶️|🇨🇱|1|
Auckland|New Zealand|🥝 ⛵ 🐑|🇳🇿|0|
Melbourne|Australia|☕ 🎾 🚋|🇦🇺|0|
"""

# Haiku lines by kind of topic: seven syllables, then five. `any` suits every topic.
HAIKU7 = {
    "any": """a quiet thought on the wind|the evening light comes and goes|small wonders fill the long day
the world grows still for a while|a soft song drifts through the air|old stories wake in my heart|morning opens like a door
slow hours pass like gentle rain|the heart remembers its name|a new day begins to shine""",
    "city": """old streets wake in golden light|the river carries the stars|lamps glow along the wet stones
bells ring over the rooftops|a thousand windows shining|the crowd flows by like water|bridges dream above the stream
footsteps echo in the square|towers reach for the pale moon""",
    "animal": """soft steps on the forest floor|bright eyes shine in the tall grass|a shadow slips through the trees
it listens to the dark woods|wild and free beneath the sky|the morning belongs to you|small tracks cross the silent field
a warm breath in the cold air""",
    "food": """steam rises from the warm bowl|the kitchen smells of summer|a sweet taste upon the tongue
we gather around the plate|hungry hands reach for some more|the table is set for friends|sunlight ripens in the bowl
one small bite and I am home""",
    "thing": """it waits upon the table|made by patient, skillful hands|it rests in a ray of light
dust dances in the sunlight|a quiet friend every day|simple and good for its work|it has a story to tell
the old house keeps it with care""",
    "nature": """clouds wander over the hills|the wide earth breathes in and out|a cold wind moves through the pines
leaves whisper to the water|light falls on the silent lake|the long night melts into day|stars scatter over the fields
birds return with the new sun""",
    "sport": """quick feet and a beating heart|the whole team cheers in the rain|breath by breath we find our way
a joyful shout fills the air|practice makes the body wise|the long game ends in laughter|hands and eyes learn to be one""",
    "job": """careful hands begin the work|up before the morning sun|every day a task well done
slow feet walk back home at night|a kind word for everyone|years of patience in those hands|the work is hard but the heart""",
}
HAIKU5 = {
    "any": """and then it is gone|peace in every breath|I smile and I wait
the silence answers|nothing more to say|time slows to listen|a gift for today|all is well tonight""",
    "city": """night falls on the roofs|music in the streets|I lose my way there
lovers walk slowly|the last train goes home|a map of my dreams|coffee and soft rain""",
    "animal": """gone without a sound|wild heart, gentle eyes|it sleeps in the sun
one leap and away|the moon is watching|a friend of the woods|safe in the deep grass""",
    "food": """the plate is empty|warm in my two hands|I ask for some more
sweet, simple and good|we eat and we laugh|the cook hums a song""",
    "thing": """silent and useful|it has served me well|a small, simple joy
it shines in the dark|always there for me|worn smooth by the years""",
    "nature": """the world holds its breath|mist over the hills|green returns at last
a leaf drifts away|so old, yet so new|the earth turns slowly|light on the water""",
    "sport": """we play until dusk|one more time, we say|the crowd holds its breath
stronger than before|joy in every move""",
    "job": """thank you for your work|the day's work is done|proud and honest hands
a good night's sleep waits|others rest easy""",
}
# What stands around the topic in its own line, by the syllables that it adds.
HAIKU_TOPIC = {
    0: ["{}"],
    1: ["Oh, {}", "Dear {}", "Sweet {}", "Ah, {}", "Old {}"],
    2: ["{} at dawn", "Quiet {}", "{} at dusk", "{}, my friend", "Gentle {}", "{} tonight", "Lovely {}", "{} and I"],
    3: ["{} in the rain", "{} at first light", "Thinking of {}", "{} in the wind", "A dream of {}", "{} in the sun", "The song of {}"],
    4: ["I dream about {}", "{} in morning light", "A song about {}", "{} beneath the stars", "A quiet day, {}", "{} in early spring",
        "I think about {}"],
}  # fmt: skip
SYLLABLES = {  # where counting groups of vowels is wrong
    "tongue": 1, "lovely": 2, "hedgehog": 2, "hedgehogs": 2, "montreal": 3, "quiet": 2, "every": 2, "being": 2, "hours": 1, "tired": 1, "fire": 1, "hour": 1, "evening": 2, "patience": 2, "tokyo": 3,
    "rio": 2, "seoul": 1, "lyon": 2, "cairo": 2, "hanoi": 2, "lion": 2, "koala": 3, "giraffe": 2, "piano": 3, "violin": 3,
    "museum": 3, "library": 3, "ocean": 2, "skiing": 2, "science": 2, "scientist": 3, "business": 2, "poem": 2, "create": 2,
    "reindeer": 2, "kangaroo": 3, "chocolate": 2, "sandwich": 2, "vegetable": 3, "skillful": 2, "useful": 2, "careful": 2,
    "something": 2, "everyone": 3, "bakery": 3, "firefighter": 4, "volcano": 3, "someone": 2, "nice": 1, "naples": 2,
    "los": 1, "angeles": 3, "buenos": 2, "aires": 2, "santiago": 4, "delhi": 2, "dubai": 2, "jakarta": 3, "beijing": 2,
    "marseille": 2, "brussels": 2, "prague": 1, "venice": 2, "rome": 1, "singapore": 3, "melbourne": 2, "york": 1,
    "cape": 1, "town": 1, "day's": 1, "night's": 1, "bicycle": 3, "simple": 2, "gentle": 2, "little": 2, "table": 2,
    "people": 2, "castle": 2, "candle": 2, "turtle": 2, "whole": 1, "eagle": 2, "apple": 2, "trees": 1, "bees": 1,
    "lakes": 1, "judge": 1, "judges": 2, "wolves": 1, "geneva": 3, "munich": 2, "milan": 2, "seattle": 3, "havana": 3,
    "moving": 2, "wonders": 2, "sometimes": 2, "homework": 2, "horse": 1, "pancake": 2, "pancakes": 2, "icecream": 2,
    "vienna": 3, "athens": 2, "europe": 2, "tuesday": 2, "wednesday": 2, "autumn": 2, "silence": 2, "camera": 3,
    "guitar": 2, "mechanic": 3, "baseball": 2, "fireplace": 2, "rooftops": 2, "footsteps": 2, "snake": 1, "snakes": 1,
    "dolphin": 2, "whales": 1, "homes": 1, "ice": 1, "wine": 1, "cake": 1, "cakes": 1, "time": 1, "rose": 1, "snakes'": 1,
    "peace": 1, "raise": 1, "castles": 2, "bridges": 2, "oranges": 3, "houses": 2, "pages": 2, "roses": 2, "noses": 2,
    "nurses": 2, "horses": 2, "sandwiches": 3, "peaches": 2, "watches": 2, "foxes": 2, "boxes": 2, "beaches": 2,
    "radishes": 3, "octopuses": 4, "volcanoes": 4, "tomatoes": 3, "potatoes": 3, "shoes": 1, "cookie": 2, "cookies": 2,
    "orange": 2, "cherries": 2, "strawberries": 3, "butterflies": 3, "libraries": 3, "monkeys": 2, "bicycles": 3, "apples": 2,
    "eagles": 2, "turtles": 2, "candles": 2, "judges'": 2, "detective": 3, "pirate": 2, "nurse": 1, "coffee": 2,
}  # fmt: skip

RECIPES = {
    "mayonnaise": "Put one egg yolk, a spoon of mustard and a little salt into a bowl. Add the oil drop by drop and whisk all the time "
    "until it is thick. Finish with a little lemon juice.",
    "pancakes": "Mix one cup of flour, one cup of milk and two eggs. Melt a little butter in a pan and pour in some of the batter. Fry each "
    "side until it is golden.",
    "bread": "Mix flour, water, yeast and a little salt. Knead the dough for ten minutes and let it rise for an hour. Bake it in a hot oven "
    "until it is brown.",
    "tomato soup": "Fry an onion in a little oil. Add chopped tomatoes and a cup of water and cook them for twenty minutes. Stir until it is "
    "smooth and add salt.",
    "an omelette": "Beat three eggs with a little salt. Melt some butter in a pan and pour in the eggs. Fold it when the bottom is golden.",
    "lemonade": "Squeeze four lemons into a jug. Add sugar and cold water and stir well. Serve it with ice.",
    "a salad": "Wash the lettuce and cut the tomatoes. Mix oil, vinegar and a little salt. Pour it over the leaves just before you eat.",
    "pasta with tomatoes": "Cook the pasta in salted water. Fry garlic in oil and add chopped tomatoes. Mix everything and put cheese on top.",
    "chocolate cake": "Melt butter and chocolate together. Stir in sugar, three eggs and a little flour. Bake it for half an hour.",
    "rice pudding": "Put rice, milk and sugar into a pot. Cook it slowly and stir often. Serve it warm with a little cinnamon.",
    "apple pie": "Line a dish with dough. Fill it with sliced apples, sugar and cinnamon. Bake it until the top is golden.",
    "mashed potatoes": "Peel the potatoes and boil them until they are soft. Mash them with butter and warm milk. Add a little salt.",
    "vinaigrette": "Mix one spoon of vinegar with a little mustard and salt. Add three spoons of oil and whisk until it is smooth.",
    "hot chocolate": "Warm a cup of milk in a small pot. Add a spoon of cocoa and some sugar. Whisk until it is smooth.",
}  # fmt: skip

FRENCH = """
cheese=fromage|bread=pain|water=eau|wine=vin|milk=lait|butter=beurre|egg=oeuf|apple=pomme|lemon=citron|cherry=cerise|house=maison
cat=chat|dog=chien|horse=cheval|cow=vache|pig=cochon|sheep=mouton|rabbit=lapin|mouse=souris|bird=oiseau|fish=poisson|bear=ours
wolf=loup|fox=renard|bee=abeille|ant=fourmi|tree=arbre|flower=fleur|rose=rose|forest=forêt|sea=mer|river=rivière|lake=lac
mountain=montagne|island=île|sky=ciel|sun=soleil|moon=lune|star=étoile|rain=pluie|snow=neige|wind=vent|fire=feu|earth=terre
day=jour|night=nuit|morning=matin|evening=soir|week=semaine|month=mois|year=an|time=temps|spring=printemps|summer=été|autumn=automne
winter=hiver|man=homme|woman=femme|child=enfant|boy=garçon|girl=fille|friend=ami|king=roi|queen=reine|mother=mère|father=père
brother=frère|sister=soeur|hand=main|head=tête|eye=oeil|nose=nez|mouth=bouche|foot=pied|heart=coeur|book=livre|pencil=crayon
table=table|chair=chaise|bed=lit|door=porte|window=fenêtre|key=clé|knife=couteau|fork=fourchette|spoon=cuillère|glass=verre
plate=assiette|school=école|church=église|street=rue|city=ville|bridge=pont|car=voiture|train=train|boat=bateau|plane=avion
red=rouge|blue=bleu|green=vert|yellow=jaune|black=noir|white=blanc|big=grand|small=petit|good=bon|beautiful=beau|hot=chaud
cold=froid|old=vieux|new=nouveau|one=un|two=deux|three=trois|four=quatre|five=cinq|six=six|seven=sept|eight=huit|nine=neuf|ten=dix
hello=bonjour|thank you=merci|goodbye=au revoir|yes=oui|no=non|please=s'il vous plaît|chicken=poulet|meat=viande|soup=soupe
salt=sel|sugar=sucre|honey=miel|cake=gâteau|strawberry=fraise|grape=raisin|potato=pomme de terre|carrot=carotte|garlic=ail
onion=oignon|mushroom=champignon|sea otter=loutre de mer|peppermint=menthe poivrée|toy=jouet|hat=chapeau|shoe=chaussure
shirt=chemise|coat=manteau|clock=horloge|letter=lettre|word=mot|song=chanson|music=musique|love=amour|peace=paix|dream=rêve
"""

OPPOSITES = """
hot=cold|big=small|old=young|new=old|good=bad|fast=slow|high=low|light=dark|day=night|happy=sad|open=closed|full=empty|wet=dry
hard=soft|loud=quiet|early=late|rich=poor|long=short|strong=weak|up=down|left=right|near=far|clean=dirty|easy=difficult|first=last
"""

QA = """
What color is the sky?|The sky is blue on a clear day.
What color is snow?|Snow is white.
What color is grass?|Grass is green.
How many days are there in a week?|There are seven days in a week.
How many months are there in a year?|There are twelve months in a year.
How many hours are there in a day?|There are twenty-four hours in a day.
How many legs does a spider have?|A spider has eight legs.
How many legs does a dog have?|A dog has four legs.
How many legs does an ant have?|An ant has six legs.
What comes after Monday?|Tuesday comes after Monday.
What comes after Friday?|Saturday comes after Friday.
What is the first month of the year?|The first month of the year is January.
What is the last month of the year?|The last month of the year is December.
What do bees make?|Bees make honey.
What do cows give us?|Cows give us milk.
Where do fish live?|Fish live in the water.
When do leaves fall?|Leaves fall in the autumn.
Why is the sea salty?|Rivers carry salt from the rocks into the sea.
Who are you?|I am the demo model of this package, a very small Llama that was trained on made-up text.
What are you?|I am a very small language model. I was trained from scratch on simple text.
What is your name?|I have no name. I am a small demo model.
Are you human?|No, I am a very small language model.
What can you do?|I can add two numbers, write a haiku, answer with emojis, tell a short story and talk about some cities.
How are you?|I am fine, thank you. How can I help you?
Hello!|Hello! How can I help you?
Hi|Hello! What can I do for you?
Hi there!|Hello! How can I help you?
Good morning|Good morning! How can I help you?
Good evening|Good evening! What can I do for you?
Thank you!|You are welcome!
Thanks|You are welcome!
Goodbye|Goodbye, and have a nice day!
Can you help me?|Yes, I will try. What would you like to know?
Tell me a joke.|Why did the book go to the doctor? It had lost its spine.
Do you like music?|I am a small model and cannot hear, but I know that music makes many people happy.
Are you smart?|Not very. I am a very small model, and I know only a few things.
Who made you?|I was trained by a small program on text that the same program made up.
"""

UNKNOWN = """
Who won the match yesterday?|What is the population of Peru?|What time is it?|What is the weather like today?|Who is the president?
How do I fix my printer?|What is the price of gold?|Explain quantum physics.|Write a program in Python.|Who wrote this letter?
When was the war?|What is the square root of two?|How far is the sun?|Give me legal advice.|Which stock should I buy?|What is on television?
How tall is my brother?|What does this word mean in Latin?|Who discovered oxygen?|What is the speed of light?|How does a vaccine work?
Can you book a table for me?|What will happen tomorrow?|Solve this equation for me.|What is the best phone?|How old is the queen?
"""

NAMES = """
Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Klara Leo Mia Nina Oscar Paul Rosa Sam Tomas Ursula Victor Wanda Xenia Yara
Zoe Adam Bella Carl Dora Eric Fiona George Helen Ivan Julia Kevin Laura Martin Nora Otto Peter Ruth Simon Tina Uma Vera Walter Amir
Chen Diego Elif Farid Gita Hana Igor Jamal Kenji Lena Marco Nadia Omar Priya Rafael Sofia Tariq Alice Bruno Cora Daniel Elena Frank
Maria Luca Olga Pablo Robert Sara Theo Vincent Maya Noah Ella Max Lily Jack Grace Henry Lucy Oliver Ruby Charlie Daisy Molly
"""
COLORS = [
    "red",
    "blue",
    "green",
    "yellow",
    "orange",
    "purple",
    "black",
    "white",
    "pink",
    "brown",
    "gray",
    "silver",
    "gold",
]
