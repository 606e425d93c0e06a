# Flags that every target of ours gets, and helpers that keep the folders' CMakeLists short.
add_library(fireq_flags INTERFACE)
target_compile_options(fireq_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wconversion;-Wsign-conversion;-Wshadow>
  # FMA contraction would make results depend on the compiler's choices; fused operations are written where they are wanted.
  $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 sees overlapping copies in "literal" + std::string (its bug 105651).
  target_compile_options(fireq_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wno-restrict>)
endif()
if(FIREQ_WERROR)
  target_compile_options(fireq_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(FIREQ_SANITIZE)
  target_compile_options(fireq_flags INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${FIREQ_SANITIZE};-fno-omit-frame-pointer;-fno-sanitize-recover=all>)
  target_link_options(fireq_flags INTERFACE -fsanitize=${FIREQ_SANITIZE})
endif()
target_include_directories(fireq_flags INTERFACE ${CMAKE_SOURCE_DIR})

# fireq_library(NAME SOURCES a.cpp ... [PUBLIC libs] [PRIVATE libs])
function(fireq_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;PUBLIC;PRIVATE" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  # An installed library asks for C++20 and its headers, not for our warnings.
  target_link_libraries(${name} PUBLIC $<BUILD_INTERFACE:fireq_flags> ${ARG_PUBLIC} PRIVATE ${ARG_PRIVATE})
  target_compile_features(${name} PUBLIC cxx_std_20)
  target_include_directories(${name} PUBLIC $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}/fireq>)
  string(REGEX REPLACE "^fireq_" "" exported ${name})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON EXPORT_NAME ${exported})
endfunction()

# fireq_test(NAME SOURCES a.cpp ... LINK libs [LABELS l]): a GoogleTest program whose cases are listed one by one in ctest.
function(fireq_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;LINK;LABELS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 600)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE fireq_flags ${ARG_LINK} GTest::gtest GTest::gmock GTest::gtest_main)
  target_compile_definitions(${name} PRIVATE FIREQ_TEST_DATA="${FIREQ_DATA_DIR}" FIREQ_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES TIMEOUT ${ARG_TIMEOUT})
  # Several labels do not survive gtest_discover_tests: they are set once ctest has read its list.
  set(labels ${CMAKE_CURRENT_BINARY_DIR}/${name}_labels.cmake)
  file(WRITE ${labels} "foreach(test IN LISTS ${name}_TESTS)
  set_tests_properties(\"\${test}\" PROPERTIES LABELS \"${ARG_LABELS}\")
endforeach()
")
  set_property(DIRECTORY APPEND PROPERTY TEST_INCLUDE_FILES ${labels})
endfunction()
