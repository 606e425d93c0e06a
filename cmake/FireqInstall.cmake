# What `cmake --install` and cpack put where: the command, and the libraries for other C++ projects
# (docs/library.md).
include(CMakePackageConfigHelpers)

set(libraries fireq_common fireq_libquant fireq_formats)
if(FIREQ_WITH_TOKENIZERS)
  list(APPEND libraries fireq_tokenizers)
endif()
install(TARGETS ${libraries} EXPORT fireq-targets ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development)

# Headers that need nothing but the standard library and each other.
set(public_headers
  common/checked.hpp common/error.hpp common/parallel.hpp common/progress.hpp common/tensor.hpp
  libquant/activation_quantizer.hpp libquant/curvature.hpp libquant/curvature_quantizer.hpp
  libquant/kv_quantizer.hpp libquant/levels.hpp libquant/metrics.hpp libquant/number_formats.hpp libquant/packing.hpp
  libquant/quantized_linear.hpp libquant/smoothing.hpp
  formats/checkpoint.hpp formats/fireq_folder.hpp formats/file_system.hpp formats/mapped_file.hpp
  formats/model_config.hpp formats/safetensors.hpp formats/statistics.hpp)
if(FIREQ_WITH_TOKENIZERS)
  list(APPEND public_headers formats/tokenizer.hpp)
endif()
foreach(header IN LISTS public_headers)
  get_filename_component(folder ${header} DIRECTORY)
  install(FILES ${header} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/fireq/${folder} COMPONENT development)
endforeach()

set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/fireq)
install(EXPORT fireq-targets NAMESPACE fireq:: DESTINATION ${package_folder} COMPONENT development)
configure_package_config_file(cmake/fireq-config.cmake.in fireq-config.cmake INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(fireq-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fireq-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/fireq-config-version.cmake
        DESTINATION ${package_folder} COMPONENT development)

find_package(HDF5 REQUIRED COMPONENTS C)
# pkg-config. The libraries are static: what they use is named outright, not as private.
set(pc_libs -lfireq_formats -lfireq_libquant -lfireq_common ${HDF5_C_LIBRARIES})
set(pc_requires libxxhash)
if(FIREQ_WITH_HIGHWAY)
  list(APPEND pc_requires libhwy)
endif()
if(FIREQ_WITH_TOKENIZERS)
  list(PREPEND pc_libs -lfireq_tokenizers)
  list(APPEND pc_requires libpcre2-8 libutf8proc sentencepiece)
endif()
list(JOIN pc_libs " " pc_libs)
list(JOIN pc_requires " " pc_requires)
file(RELATIVE_PATH pc_prefix /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
configure_file(cmake/fireq.pc.in fireq.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/fireq.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT development)

install(FILES LICENSE NOTICE README.md docs/recipe.schema.json DESTINATION ${CMAKE_INSTALL_DOCDIR})

# cpack -G DEB: one package with the command, one for development.
set(CPACK_PACKAGE_NAME fireq)
set(CPACK_PACKAGE_VENDOR "FireQ developers")
set(CPACK_PACKAGE_CONTACT "FireQ developers <fireq@localhost>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "Llama-family checkpoints to 4 bits")
set(CPACK_RESOURCE_FILE_LICENSE ${CMAKE_SOURCE_DIR}/LICENSE)
set(CPACK_GENERATOR DEB)
set(CPACK_DEB_COMPONENT_INSTALL ON)
set(CPACK_COMPONENTS_ALL Unspecified development)
set(CPACK_COMPONENTS_GROUPING IGNORE)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_UNSPECIFIED_PACKAGE_NAME fireq)
set(CPACK_DEBIAN_UNSPECIFIED_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_UNSPECIFIED_PACKAGE_DEPENDS "libopenblas0-pthread")  # loaded when needed, so not seen by shlibdeps
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_NAME libfireq-dev)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_SECTION libdevel)
set(CPACK_DEBIAN_DEVELOPMENT_PACKAGE_DEPENDS "libxxhash-dev, libhdf5-dev, libopenblas0-pthread, libhwy-dev, libpcre2-dev, libutf8proc-dev, libsentencepiece-dev, pkgconf")
set(CPACK_STRIP_FILES ON)
include(CPack)
