"""Subjects of the published benchmarks: their categories and how many questions each has.

Sources, each the benchmark's own repository: MMLU hendrycks/test `categories.py` and the released data.tar; CMMLU
haonan-li/CMMLU `src/categories.py` and its test files;
AGIEval ruixiangcui/AGIEval `data/v1`; GAOKAO-Bench OpenLMLab/GAOKAO-Bench `Data/Objective_Questions` (1781 examples in
its README); C-Eval hkust-nlp/ceval `subject_mapping.json` (its paper, 2305.08322, gives totals only); GSM8K
openai/grade-school-math; MT-Bench lm-sys/FastChat `question.jsonl`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """`count`: published questions to be scored; None where only the benchmark's total is published."""

    category: str
    count: int | None
    name: str


def _table(text: str) -> dict[str, Subject]:
    """Lines `category: name count, ...`, with `=title` after a name for what people call it; `_` is a space."""
    subjects = {}
    for line in text.strip().splitlines():
        category, _, entries = line.partition(": ")
        for entry in entries.split(", "):
            key, *rest = entry.split()
            key, _, title = key.partition("=")
            subjects[key] = Subject(category, int(rest[0]) if rest else None, (title or key).replace("_", " "))
    return subjects


MMLU = _table("""
STEM: abstract_algebra 100, astronomy 152, college_biology 144, college_chemistry 100, college_computer_science 100, college_mathematics 100, college_physics 102, computer_security 100, conceptual_physics 235, electrical_engineering 145, elementary_mathematics 378, high_school_biology 310, high_school_chemistry 203, high_school_computer_science 100, high_school_mathematics 270, high_school_physics 151, high_school_statistics 216, machine_learning 112
humanities: formal_logic 126, high_school_european_history 165, high_school_us_history 204, high_school_world_history 237, international_law 121, jurisprudence 108, logical_fallacies 163, moral_disputes 346, moral_scenarios 895, philosophy 311, prehistory 324, professional_law 1534, world_religions 171
social sciences: econometrics 114, high_school_geography 198, high_school_government_and_politics 193, high_school_macroeconomics 390, high_school_microeconomics 238, high_school_psychology 545, human_sexuality 131, professional_psychology 612, public_relations 110, security_studies 245, sociology 201, us_foreign_policy 100
other: anatomy 135, business_ethics 100, clinical_knowledge 265, college_medicine 173, global_facts 100, human_aging 223, management 103, marketing 234, medical_genetics 100, miscellaneous 783, nutrition 306, professional_accounting 282, professional_medicine 272, virology 166
""")  # noqa: E501

CMMLU = _table("""
STEM: anatomy=解剖学 148, astronomy=天文学 165, college_actuarial_science=大学精算学 106, college_engineering_hydrology=大学工程水文学 106, college_mathematics=大学数学 105, college_medical_statistics=大学医学统计 106, computer_science=计算机科学 204, conceptual_physics=概念物理学 147, electrical_engineering=电气工程 172, elementary_mathematics=初等数学 230, genetics=遗传学 176, high_school_biology=高中生物 169, high_school_chemistry=高中化学 132, high_school_mathematics=高中数学 164, high_school_physics=高中物理学 110, machine_learning=机器学习 122, virology=病毒学 169
Humanities: arts=艺术学 160, chinese_history=中国历史 323, chinese_literature=中国文学 204, college_law=大学法律 108, global_facts=全球事实 149, international_law=国际法学 185, jurisprudence=法理学 411, logical=逻辑学 123, marxist_theory=马克思主义理论 189, philosophy=哲学 105, professional_law=专业法学 211, world_history=世界历史 161, world_religions=世界宗教 160
Social Science: ancient_chinese=古汉语 164, business_ethics=商业伦理 209, chinese_civil_service_exam=中国公务员考试 160, chinese_food_culture=中国饮食文化 136, chinese_foreign_policy=中国外交政策 107, chinese_teacher_qualification=中国教师资格 179, college_education=大学教育学 107, economics=经济学 159, education=教育学 163, elementary_chinese=小学语文 252, ethnology=民族学 135, high_school_geography=高中地理 118, high_school_politics=高中政治 143, journalism=新闻学 172, management=管理学 210, marketing=市场营销 180, modern_chinese=现代汉语 116, professional_accounting=专业会计 175, professional_psychology=专业心理学 232, public_relations=公共关系 174, security_study=安全研究 135, sociology=社会学 226
Other: agronomy=农学 169, chinese_driving_rule=中国驾驶规则 131, clinical_knowledge=临床知识 237, college_medicine=大学医学 273, computer_security=计算机安全 171, construction_project_management=建设工程管理 139, elementary_commonsense=小学常识 198, elementary_information_and_technology=小学信息技术 238, food_science=食品科学 143, human_sexuality=人类性行为 126, legal_and_moral_basis=法律与道德基础 214, nutrition=营养学 145, professional_medicine=专业医学 376, sports_science=体育学 165, traditional_chinese_medicine=中医中药 185
""")  # noqa: E501

CEVAL = _table("""
STEM: computer_network=计算机网络, operating_system=操作系统, computer_architecture=计算机组成, college_programming=大学编程, college_physics=大学物理, college_chemistry=大学化学, advanced_mathematics=高等数学, probability_and_statistics=概率统计, discrete_mathematics=离散数学, electrical_engineer=注册电气工程师, metrology_engineer=注册计量师, high_school_mathematics=高中数学, high_school_physics=高中物理, high_school_chemistry=高中化学, high_school_biology=高中生物, middle_school_mathematics=初中数学, middle_school_biology=初中生物, middle_school_physics=初中物理, middle_school_chemistry=初中化学, veterinary_medicine=兽医学
Social Science: college_economics=大学经济学, business_administration=工商管理, marxism=马克思主义基本原理, mao_zedong_thought=毛泽东思想和中国特色社会主义理论体系概论, education_science=教育学, teacher_qualification=教师资格, high_school_politics=高中政治, high_school_geography=高中地理, middle_school_politics=初中政治, middle_school_geography=初中地理
Humanities: modern_chinese_history=近代史纲要, ideological_and_moral_cultivation=思想道德修养与法律基础, logic=逻辑学, law=法学, chinese_language_and_literature=中国语言文学, art_studies=艺术学, professional_tour_guide=导游资格, legal_professional=法律职业资格, high_school_chinese=高中语文, high_school_history=高中历史, middle_school_history=初中历史
Other: civil_servant=公务员, sports_science=体育学, plant_protection=植物保护, basic_medicine=基础医学, clinical_medicine=临床医学, urban_and_rural_planner=注册城乡规划师, accountant=注册会计师, fire_engineer=注册消防工程师, environmental_impact_assessment_engineer=环境影响评价工程师, tax_accountant=税务师, physician=医师资格
""")  # noqa: E501

AGIEVAL = _table("""
Gaokao: gaokao-biology=高考生物 210, gaokao-chemistry=高考化学 207, gaokao-chinese=高考语文 246, gaokao-english=the_Gaokao_English_exam 306, gaokao-geography=高考地理 199, gaokao-history=高考历史 235, gaokao-mathcloze=高考数学 118, gaokao-mathqa=高考数学 351, gaokao-physics=高考物理 200
Law: jec-qa-ca=国家司法考试案例分析 1000, jec-qa-kd=国家司法考试知识 1000, lsat-ar=LSAT_analytical_reasoning 230, lsat-lr=LSAT_logical_reasoning 510, lsat-rc=LSAT_reading_comprehension 269
SAT: sat-en=SAT_English 206, sat-en-without-passage=SAT_English 206, sat-math=SAT_mathematics 220
Logic and mathematics: aqua-rat=algebra_word_problems 254, logiqa-en=logical_reasoning 651, logiqa-zh=逻辑推理 651, math=mathematics 1000
""")  # noqa: E501

GAOKAO = _table("""
English: 2010-2013_English_MCQs=English 105, 2010-2022_English_Fill_in_Blanks=English 30, 2010-2022_English_Reading_Comp=English_reading_comprehension 124, 2012-2022_English_Cloze_Test=English 26
Mathematics: 2010-2022_Math_I_MCQs=高考理科数学 214, 2010-2022_Math_II_MCQs=高考文科数学 218
Chinese: 2010-2022_Chinese_Lang_and_Usage_MCQs=高考语文语言文字运用 56, 2010-2022_Chinese_Modern_Lit=高考语文现代文阅读 29
Sciences: 2010-2022_Biology_MCQs=高考生物 150, 2010-2022_Chemistry_MCQs=高考化学 124, 2010-2022_Physics_MCQs=高考物理 64
Humanities: 2010-2022_Geography_MCQs=高考地理 34, 2010-2022_History_MCQs=高考历史 287, 2010-2022_Political_Science_MCQs=高考政治 320
""")  # noqa: E501

GSM8K = _table("mathematics: gsm8k 1319")
MT_BENCH = _table("dialogue: mt_bench 80")

# Categories that lie across the others: a subject counts in both.
_CHINA = """
ancient_chinese chinese_civil_service_exam chinese_driving_rule chinese_food_culture chinese_foreign_policy
chinese_history chinese_literature chinese_teacher_qualification construction_project_management elementary_chinese
elementary_commonsense ethnology high_school_politics modern_chinese traditional_chinese_medicine
"""
ACROSS = {"cmmlu": {"China specific": tuple(_CHINA.split())}}

SUBJECTS = {
    "mmlu": MMLU,
    "cmmlu": CMMLU,
    "ceval": CEVAL,
    "agieval": AGIEVAL,
    "gaokao_bench": GAOKAO,
    "gsm8k": GSM8K,
    "mt_bench": MT_BENCH,
}
# C-Eval's answers are published for its validation part only, so that is what is scored.
TOTALS = {"ceval": 1346} | {
    name: sum(subject.count or 0 for subject in table.values()) for name, table in SUBJECTS.items() if name != "ceval"
}
