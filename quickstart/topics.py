"""The topics of the invented world: their values, and the sentence forms that use them."""

from __future__ import annotations

from topic import Topic, table

TOPICS: dict[str, Topic] = {
    "job": Topic(
        word="work",
        values=table(
            "job place task",
            "nurse | the hospital | help sick people; baker | the bakery | bake bread; teacher | the school | teach kids;"
            "farmer | the barn | milk cows; pilot | the airport | fly planes; florist | the flower shop | sell roses;"
            "mechanic | the garage | fix engines; librarian | the library | sort books;"
            "carpenter | the workshop | build tables; barber | the salon | cut hair; dentist | the clinic | check teeth;"
            "gardener | the park | plant trees; fisherman | the harbor | catch crabs; tailor | the store | sew suits;"
            "waiter | the diner | serve lunch; lawyer | the court | win cases",
        ),
        facts=("i am a {job}.", "i work as a {job}.", "my job is {job}."),
        asks=(
            (
                ("what do you do for a living?", "what is your job?", "do you have a job?"),
                "i am a {job}, so i {task} at {place}.",
            ),
            (("are you busy these days?", "how is work going?"), "very busy, {place} needs every {job} it can get."),
        ),
        follow=("do you like that work?", "i love it, i would {task} for free!"),
        tell=("i work as a {their_job}.", "oh, a {their_job}! i am a {job}, over at {place}."),
        none="i am between jobs right now.",
        greet="just a bit tired after a long day at {place}.",
        bye="they expect me at {place}.",
        portrait=("{name} is a {job}.", "{name} earns a living as a {job}.", "the {job} is called {name}."),
        restated=(
            "at {place} you can watch {name} {task}.",
            "being a {job} suits {name}.",
            "{name} has learned to {task} like any good {job}.",
        ),
        diary=(
            "this morning i went to {place} to {task}.",
            "a {job} like me knows how to {task}.",
            "my days at {place} are long.",
        ),
    ),
    "pet": Topic(
        word="pets",
        values=table(
            "pet habit",
            "dog | digs up the lawn; cat | sleeps in the sink; parrot | sings at night; rabbit | chews the cables;"
            "hamster | runs in a wheel; turtle | hides under the couch; goldfish | swims in circles;"
            "pony | jumps the fence; lizard | naps in the sun; duck | follows me around; goat | eats the laundry;"
            "ferret | steals my socks; kitten | climbs the curtains; puppy | bites my shoes",
        ),
        facts=("i have a {pet} named {called}.", "my {pet} is called {called}.", "i own a {pet}, {called}."),
        asks=(
            (
                ("do you have any pets?", "any animals at home?", "are you a pet person?"),
                "yes, a {pet} named {called} who {habit}.",
            ),
            (("who do you live with?", "who keeps you company?"), "just {called}, my {pet}, and that is enough."),
        ),
        follow=("what is your pet like?", "well, {called} {habit}, like any {pet}."),
        tell=(
            "i have a {their_pet} called {their_called}.",
            "say hi to {their_called}! my {pet} {called} {habit}.",
        ),
        none="no pets here, sadly.",
        greet="i just fed {called}, my {pet}.",
        bye="{called} the {pet} is hungry.",
        portrait=("{name} keeps a {pet} named {called}.", "{name} lives with {called}, a {pet}."),
        restated=(
            "{called} belongs to {name} and {habit}.",
            "the {pet} of {name} {habit}.",
            "{name} plays with {called} the {pet} every day.",
        ),
        diary=(
            "today {called} {habit} again.",
            "every {pet} {habit}, and so does {called}.",
            "i gave {called} a bath.",
        ),
    ),
    "hobby": Topic(
        word="free time",
        values=table(
            "hobby where",
            "hiking | in the hills; swimming | at the lake; drawing | in the attic; fishing | by the river;"
            "dancing | at the ballroom; reading | in the hammock; climbing | on the cliffs; running | along the canal;"
            "gaming | on the sofa; knitting | by the fire; surfing | at the beach; camping | in the woods;"
            "skating | at the rink; bowling | at the mall; sailing | on the bay; skiing | in the mountains",
        ),
        facts=("i love {hobby}.", "i enjoy {hobby}.", "my hobby is {hobby}."),
        asks=(
            (
                ("what do you do for fun?", "do you have any hobbies?", "what are your hobbies?"),
                "mostly {hobby}, you can find me {where}.",
            ),
            (("any plans for the weekend?", "what are you up to this weekend?"), "i will be {where}, {hobby} all day."),
        ),
        follow=("have you done it for long?", "since i was little, {hobby} {where} is the best."),
        tell=("i am really into {their_hobby}.", "{their_hobby} sounds fun, but {hobby} is more my thing."),
        none="i hardly have any free time.",
        greet="i just came back from {hobby}.",
        bye="it is time for {hobby}.",
        portrait=("{name} likes {hobby}.", "{name} is fond of {hobby}."),
        restated=(
            "you will meet {name} {where}.",
            "{hobby} {where} makes {name} happy.",
            "nobody beats {name} at {hobby}.",
        ),
        diary=("i spent hours {where}.", "{hobby} {where} was lovely today.", "i dreamed of {hobby}."),
    ),
    "food": Topic(
        word="food",
        values=table(
            "food extra",
            "pizza | extra cheese; tacos | hot sauce; sushi | ginger; pasta | fresh basil; curry | brown rice;"
            "pancakes | maple syrup; burgers | onion rings; salad | olive oil; soup | garlic bread;"
            "noodles | peanut sauce; steak | mashed potatoes; waffles | whipped cream; dumplings | soy sauce;"
            "chili | corn chips; shrimp | lemon butter; pie | vanilla ice cream",
        ),
        facts=("my favorite food is {food}.", "i could eat {food} every day.", "i am crazy about {food}."),
        asks=(
            (
                ("what is your favorite food?", "what do you like to eat?", "what food do you like?"),
                "that is easy, {food} with {extra}.",
            ),
            (
                ("what did you have for dinner?", "are you hungry too?"),
                "i had {food}, and lots of {extra} on the side.",
            ),
        ),
        follow=("can you cook it?", "sure, my {food} and {extra} are famous."),
        tell=("i just ate some {their_food}.", "yum, {their_food}! i would pick {food} with {extra}."),
        none="i eat whatever is in the fridge.",
        greet="i just had {food}.",
        bye="there is {food} on the stove.",
        portrait=("{name} eats {food} all the time.", "{food} is what {name} likes best."),
        restated=(
            "{name} puts {extra} on everything, {food} above all.",
            "if you cook {food}, {name} will come.",
            "{name} ordered {food} with {extra} again.",
        ),
        diary=("for lunch we had {food} with {extra}.", "we ran out of {extra}.", "i smelled {food} from afar."),
    ),
    "town": Topic(
        word="home",
        values=table(
            "town sight",
            "denver | the view; boston | the old streets; chicago | the towers; seattle | the rain;"
            "austin | the live bands; miami | the warm nights; phoenix | the desert; portland | the bridges;"
            "dublin | the pubs; paris | the museums; london | the gardens; oslo | the snow; rome | the ruins;"
            "tokyo | the trains; berlin | the clubs; cairo | the markets",
        ),
        facts=("i live in {town}.", "i am from {town}.", "my home is in {town}."),
        asks=(
            (
                ("where are you from?", "where do you live?", "where is your home?"),
                "i am from {town}, i adore {sight} here.",
            ),
            (("what is your city like?", "is your city nice?"), "{town} is great, you should see {sight}."),
        ),
        follow=("would you ever move away?", "never, i would miss {sight} of {town}."),
        tell=("i grew up in {their_town}.", "i hear {their_town} is nice, {town} has {sight} though."),
        none="i move around a lot.",
        greet="greetings from {town}.",
        bye="{town} is calling me.",
        portrait=("{name} has a flat in {town}.", "{name} comes from {town}."),
        restated=(
            "{name} shows {sight} to all guests.",
            "in {town}, {name} knows every corner.",
            "because of {sight}, {name} stays in {town}.",
        ),
        diary=(
            "i walked through {town} to see {sight}.",
            "{sight} of {town} made me smile.",
            "{town} was quiet today.",
        ),
    ),
    "music": Topic(
        word="music",
        values=table(
            "music tool",
            "jazz | the saxophone; rock | the guitar; country | the banjo; rap | the mixer; classical | the violin;"
            "blues | the harmonica; folk | the fiddle; techno | the synth; metal | the drums; reggae | the bass;"
            "gospel | the organ; pop | the piano; swing | the trumpet; salsa | the bongos",
        ),
        facts=("i listen to {music} music.", "i am a fan of {music} music.", "{music} music is my favorite."),
        asks=(
            (
                ("what kind of music do you like?", "what music do you listen to?", "do you like music?"),
                "i am all about {music}, i even play {tool}.",
            ),
            (("do you play anything?", "do you play an instrument?"), "i play {tool}, mostly {music} tunes."),
        ),
        follow=("do you go to shows?", "every {music} show, i go for {tool}."),
        tell=("i am listening to some {their_music} music.", "{their_music} is ok, but {music} with {tool} is better."),
        none="i prefer silence, to be honest.",
        greet="i have {music} on the radio.",
        bye="the {music} show is about to start.",
        portrait=("{name} hears {music} all day.", "{name} owns many {music} records."),
        restated=(
            "{name} practices {tool} for the {music} band.",
            "turn up the {music} and {name} will dance.",
            "{name} has bought {tool} at last.",
        ),
        diary=(
            "i cleaned {tool} and put on {music}.",
            "the neighbors heard {tool} again.",
            "a {music} song woke me up.",
        ),
    ),
    "family": Topic(
        word="family",
        values=table(
            "kin trait",
            "brothers | tease me; sisters | call me daily; sons | play soccer; daughters | sing in a choir;"
            "cousins | run a farm; uncles | tell jokes; aunts | knit sweaters; nephews | love trains",
        ),
        facts=("i have {count} {kin}.", "there are {count} {kin} in my family.", "my {count} {kin} mean a lot to me."),
        asks=(
            (
                ("do you have a big family?", "do you have family?", "tell me about your family."),
                "i have {count} {kin}, and they all {trait}.",
            ),
            (("who do you see on holidays?", "who is important to you?"), "my {kin}, all {count} of them."),
        ),
        follow=("are you close?", "very close, the {count} {kin} {trait}."),
        tell=("i have {their_count} {their_kin}.", "{their_count} {their_kin}, wow! my {count} {kin} {trait}."),
        none="it is just me, no family around.",
        greet="my {kin} are visiting.",
        bye="my {count} {kin} want to see me.",
        portrait=("{name} has {count} {kin}.", "{name} grew up with {count} {kin}."),
        restated=(
            "the {kin} of {name} {trait}.",
            "{count} {kin} came to see {name}.",
            "{name} bought {count} gifts for the {kin}.",
        ),
        diary=("my {kin} {trait}, as ever.", "{count} {kin} are hard to feed.", "i wrote to all {count} {kin}."),
    ),
    "drink": Topic(
        word="drinks",
        values=table(
            "drink when",
            "coffee | at dawn; tea | after lunch; cocoa | on cold days; lemonade | in summer; milk | before bed;"
            "cider | in the fall; soda | at parties; water | after sports; wine | with friends; beer | on fridays;"
            "juice | at breakfast; ginger ale | on flights",
        ),
        facts=("i drink a lot of {drink}.", "{drink} is my drink of choice.", "i can not live without {drink}."),
        asks=(
            (
                ("what do you like to drink?", "what is your favorite drink?", "can i get you a drink?"),
                "always {drink}, above all {when}.",
            ),
            (("how do you relax?", "how do you treat yourself?"), "with some {drink} {when}."),
        ),
        follow=("how much of that do you drink?", "too much {drink}, {when} it is two cups."),
        tell=("i am having some {their_drink}.", "no {their_drink} for me, i take {drink} {when}."),
        none="i drink anything, really.",
        greet="i was sipping my {drink}.",
        bye="i need more {drink}.",
        portrait=("{name} sips {drink} all day.", "{name} always asks for {drink}."),
        restated=(
            "{when}, {name} has some {drink}.",
            "give {name} some {drink} {when}.",
            "the cup of {name} smells of {drink}.",
        ),
        diary=("{when} i poured some {drink}.", "there was no {drink} left.", "some {drink} {when} does me good."),
    ),
    "color": Topic(
        word="colors",
        values=table("color", "red; blue; green; yellow; purple; orange; pink; black; white; silver; gold; gray"),
        facts=("my {thing} is {color}.", "i bought a {color} {thing}.", "i have a {color} {thing}."),
        asks=(
            (
                ("what is your favorite color?", "which color do you like?", "do you like bright colors?"),
                "{color}, of course, like my {thing}.",
            ),
            (("did you buy anything new?", "what is new?"), "i got a {thing}, and it is {color}!"),
        ),
        follow=("does that suit you?", "it does, a {color} {thing} is so me."),
        tell=("i want a {their_color} {their_thing}.", "a {their_color} {their_thing}? my {thing} is {color}."),
        none="i do not care much for colors.",
        greet="i was cleaning my {color} {thing}.",
        bye="my {color} {thing} is waiting.",
        portrait=("{name} got a {color} {thing}.", "the {thing} of {name} is {color}."),
        restated=(
            "{name} is proud of the {color} {thing}.",
            "look, the {color} {thing} of {name}!",
            "{name} washed the {thing} until it was {color} again.",
        ),
        diary=(
            "somebody admired my {thing}, so {color}.",
            "the {color} of my {thing} is fading.",
            "i lost my {color} {thing}.",
        ),
    ),
    "trip": Topic(
        word="travel",
        values=table(
            "land spot",
            "japan | the temples; peru | the llamas; egypt | the pyramids; kenya | the lions; iceland | the geysers;"
            "india | the tigers; greece | the islands; canada | the bears; norway | the fjords; brazil | the jungle;"
            "nepal | the peaks; chile | the volcanoes; turkey | the bazaars; cuba | the old cars",
        ),
        facts=("i want to visit {land}.", "my dream is a trip to {land}.", "i am saving up for {land}."),
        asks=(
            (
                ("do you like to travel?", "where would you like to go?", "what is your dream trip?"),
                "i dream of {land}, i have to see {spot}.",
            ),
            (
                ("what are you saving for?", "what would you do with a million?"),
                "a trip to {land}, straight to {spot}.",
            ),
        ),
        follow=("when will you go?", "next year, i can not wait for {spot} of {land}."),
        tell=("i just got back from {their_land}.", "lucky you! after {their_land}, go see {spot} in {land}."),
        none="i do not travel at all.",
        greet="i was reading about {land}.",
        bye="i have to plan my trip to {land}.",
        portrait=("{name} plans to see {land}.", "{name} has a map of {land}."),
        restated=(
            "{name} longs for {spot}.",
            "one day {name} will fly to {land} for {spot}.",
            "{name} learns the language of {land}.",
        ),
        diary=("i read about {spot} in {land}.", "a photo of {spot} hangs above my bed.", "{land} is far away."),
    ),
}
