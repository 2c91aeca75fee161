"""Words and tokens fit the language: gold scores 100 in every script, a random reply little, and English as ever."""

import importlib.util

import pytest

from kestrel.evaluation.generations import Reply
from kestrel.evaluation.metrics import Choices, bleu_signature, f1_signature, rouge_signature
from kestrel.evaluation.resampling import Dialogues
from kestrel.evaluation.systems import System, score
from kestrel.evaluation.units import ENGLISH, Units, choose_units

# The languages that CLDR counts most speakers of, in their scripts; a few short replies each.
TEXTS = {
    "en": "i have two dogs .|do you like music ?|my sister works in a bank downtown .|we went to the lake .",
    "zh": "我养了两只狗。|你喜欢听音乐吗？|我姐姐在银行工作。|上个周末我们去湖边了。",
    "hi": "मेरे पास दो कुत्ते हैं।|क्या आपको संगीत पसंद है?|मेरी बहन बैंक में काम करती है।|हम पिछले हफ़्ते झील गए थे।",
    "es": "tengo dos perros y un gato pequeño.|¿te gusta la música clásica?|mi hermana trabaja aquí mañana.|fuimos al río.",
    "ar": "لدي كلبان وقطة صغيرة.|هل تحب الموسيقى؟|أختي تعمل في بنك كبير.|ذهبنا إلى البحيرة أمس.",
    "fr": "j'ai deux chiens très âgés.|tu aimes la musique ?|ma sœur travaille à la banque.|nous étions au bord du lac.",
    "bn": "আমার দুটি কুকুর আছে।|তুমি কি গান পছন্দ করো?|আমার বোন ব্যাংকে কাজ করে।|আমরা গত সপ্তাহে নদীতে গিয়েছিলাম।",
    "pt": "tenho dois cães e não tenho gatos.|você gosta de música?|minha irmã trabalha aqui.|fomos à praia no sábado.",
    "ru": "у меня две собаки.|ты любишь музыку?|моя сестра работает в банке.|мы ездили на озеро.",
    "ur": "میرے پاس دو کتے ہیں۔|کیا آپ کو موسیقی پسند ہے؟|میری بہن بینک میں کام کرتی ہے۔|ہم جھیل گئے تھے۔",
    "id": "saya punya dua anjing .|apakah kamu suka musik ?|kakak perempuan bekerja di bank .|kami pergi ke danau kemarin .",
    "de": "ich habe zwei schöne hunde.|hörst du gern musik?|meine schwester arbeitet für eine bank.|wir waren am fluss.",
    "ja": "犬を二匹飼っています。|音楽は好きですか？|姉は銀行で働いているよ。|先週みんなで湖に行きました。",
    "sw": "nina mbwa wawili wadogo .|unapenda kusikiliza muziki ?|dada yangu anafanya kazi benki .|tulienda ziwani jana .",
    "mr": "माझ्याकडे दोन कुत्रे आहेत.|तुला संगीत आवडते का?|माझी बहीण बँकेत काम करते.|आम्ही तलावावर गेलो होतो.",
    "te": "నా దగ్గర రెండు కుక్కలు ఉన్నాయి.|మీకు సంగీతం ఇష్టమా?|మా అక్క బ్యాంకులో పని చేస్తుంది.|మేము చెరువుకు వెళ్ళాము.",
    "tr": "iki köpeğim ve bir kedim var.|müzik dinlemeyi sever misin?|ablam bankada çalışıyor.|geçen hafta göle gittik.",
    "ta": "என்னிடம் இரண்டு நாய்கள் உள்ளன.|உனக்கு இசை பிடிக்குமா?|என் அக்கா வங்கியில் வேலை செய்கிறார்.|நாங்கள் ஏரிக்கு சென்றோம்.",
    "vi": "tôi có hai con chó nhỏ.|bạn có thích âm nhạc không?|chị gái làm việc ở ngân hàng.|chúng tôi đã đi hồ.",
    "ko": "저는 개 두 마리를 키워요.|음악을 좋아하세요?|제 언니는 은행에서 일합니다.|지난주에 호수에 갔어요.",
    "th": "ฉันมีหมาสองตัว|คุณชอบฟังเพลงไหม|พี่สาวทำงานที่ธนาคาร|เราไปทะเลสาบเมื่อวาน",
}
JAPANESE = "ja-mecab" if importlib.util.find_spec("MeCab") else "char"
KOREAN = "ko-mecab" if importlib.util.find_spec("mecab_ko") else "char"
TOKENIZERS = dict.fromkeys(TEXTS, "13a") | {
    "zh": "zh", "ja": JAPANESE, "ko": KOREAN, "th": "char",
} | dict.fromkeys(("hi", "ar", "bn", "ur", "mr", "te", "ta"), "intl")  # fmt: skip
HEADLINES = ("bleu", "rouge_l", "f1")


def points(responses: list[str], references: list[str], units: Units) -> dict[str, float]:
    rows = [Reply(f"d{i}", 1, gold, said, 1) for i, (said, gold) in enumerate(zip(responses, references, strict=True))]
    system = System("system", "", rows)
    score({"s": system}, Dialogues([row.dialogue_id for row in rows], 100, 0), Choices(units))
    return {name: system.point[name] for name in HEADLINES}


@pytest.mark.parametrize("language", TEXTS)
def test_gold_scores_100_and_another_reply_little(language):
    texts = TEXTS[language].split("|")
    units = choose_units(texts, "auto")
    assert units.tokenizer == TOKENIZERS[language]
    assert units.english == all(text.isascii() for text in texts)
    assert points(texts, texts, units) == pytest.approx(dict.fromkeys(HEADLINES, 100))
    others = points(texts[1:] + texts[:1], texts, units)
    assert all(value < 30 for value in others.values()), others


def test_signatures_name_the_units():
    units = choose_units(TEXTS["zh"].split("|"), "auto")
    assert "tok:zh" in bleu_signature(Choices(units))
    assert "words:uax29" in rouge_signature(Choices(units)) and "words:uax29" in f1_signature(Choices(units))
    assert "words:uax29" not in rouge_signature(Choices()) + f1_signature(Choices())


def test_a_tokenizer_by_name_and_the_words_of_english():
    texts = TEXTS["zh"].split("|")
    assert choose_units(texts, "char").tokenizer == "char"
    emoji = ["😀😀🎉🎉", "👍🏽", "👨‍👩‍👧‍👦🏖️🌊", "?!"]  # without a word in them
    assert points(emoji, emoji, choose_units(emoji, "auto")) == pytest.approx(dict.fromkeys(HEADLINES, 100))
    assert choose_units(texts, "13a") == ENGLISH
    loans = ["a naïve café owner , that is what i am today .", "we love to read and write all day long .", "yes i do ."]
    assert (
        choose_units(loans * 3 + ["nothing else to say , my dear old friend of many years ."] * 30, "auto") == ENGLISH
    )
    assert Units("13a", english=False).words("L'été, ¡SÍ! 🙂 3.5") == ["l'été", "sí", "🙂", "3.5"]
    assert Units("13a", english=False).words("?!") == ["?", "!"]  # so that such a reply equals itself
