# config.json and plain UTF-8 need none of the tokenizers' libraries.
target_sources(fireq_formats PRIVATE model_config.cpp model_config_json.cpp unicode.cpp)
if(FIREQ_WITH_TOKENIZERS)
  pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
  pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
  pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
  fireq_library(fireq_tokenizers
    SOURCES tokenizer.cpp tokenizer_json.cpp tokenizer_added.cpp tokenizer_normalizer.cpp tokenizer_pretokenizer.cpp
            tokenizer_bpe.cpp tokenizer_decoder.cpp tokenizer_regex.cpp tokenizer_sentencepiece.cpp
            tokenizer_sentencepiece_model.cpp unicode_classes.cpp chat.cpp
    PUBLIC fireq_common fireq_formats
    PRIVATE $<BUILD_INTERFACE:nlohmann_json::nlohmann_json> PkgConfig::PCRE2 PkgConfig::UTF8PROC PkgConfig::SENTENCEPIECE)
endif()
